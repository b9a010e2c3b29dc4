"""Kernels compile for GPUs that are not here, and nothing spills."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from graphwright.backends.triton.status import triton_status

pytestmark = pytest.mark.skipif(not triton_status().available, reason=triton_status().message)

# A few that stand for the rest: `python -m graphwright.backends.triton.compile` compiles every configuration.
ONLY = ("gradients of norms", "linear_nbits 1 rows, 4 bits, 128, asymmetric", "attention 128")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Of another process, which does not interpret."""
    target = tmp_path_factory.mktemp("compiled") / "rows.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    only = [item for name in ONLY for item in ("--only", name)]
    command = [sys.executable, "-m", "graphwright.backends.triton.compile", "--first", "--target", "sm_80"]
    command += ["--target", "sm_90", *only, "--json", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found: list[dict[str, Any]] = json.loads(Path(target).read_text(encoding="utf-8"))
    return found


def test_nothing_spills(rows: list[dict[str, Any]]) -> None:
    assert {row["target"] for row in rows} == {"sm_80", "sm_90"}
    assert all(row["registers"] > 0 for row in rows)
    assert [row for row in rows if row["spilled"]] == []


def test_what_spills_does_not_fit() -> None:
    from graphwright.backends.triton.compile import Compiled

    row = Compiled("norms", "norm", "", "sm_90", registers=255, shared=0, spilled=8, seconds=0.0)
    assert not row.fits
    assert "DOES NOT FIT" in str(row)
    assert not Compiled("norms", "norm", "", "sm_80", registers=64, shared=200_000, spilled=0, seconds=0.0).fits
