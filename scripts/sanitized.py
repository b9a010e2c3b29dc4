"""Runs tests on the extension in ``build/sanitize`` instead of the editable installation's; see ``make sanitize``."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

BUILT = Path(__file__).resolve().parent.parent / "build" / "sanitize"


def main() -> int:
    """Run pytest with the arguments given; the exit code is pytest's."""
    # The editable installation finds the package by a hook of its own, before any path is looked at.
    sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in type(finder).__module__]
    sys.path.insert(0, str(BUILT))
    import graphwright.backends.cpu._native as native

    if not str(native.__file__).startswith(str(BUILT)):
        sys.exit(f"the extension comes from {native.__file__}, not from {BUILT}")
    return int(pytest.main(sys.argv[1:]))


if __name__ == "__main__":
    raise SystemExit(main())
