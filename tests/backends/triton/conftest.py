"""Kernels run under triton's interpreter, which must have been chosen before triton was imported."""

from __future__ import annotations

import importlib.util
import os

collect_ignore_glob = []
if importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_kernels_*.py"]
else:
    import triton

    if not triton.knobs.runtime.interpret or os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("tests/conftest.py must set TRITON_INTERPRET before anything imports triton")
