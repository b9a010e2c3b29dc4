"""``python -m graphwright.backends.cpu``: print what this CPU can run. ``--missing`` prints only what is missing."""

from __future__ import annotations

import sys

from graphwright.backends.cpu.features import features
from graphwright.backends.cpu.native import native_status
from graphwright.ir.errors import GraphwrightError


def main(arguments: list[str]) -> int:
    """Print, and return the exit code: 2 for a wrong ``GRAPHWRIGHT_CPU_ISA``."""
    if arguments == ["--missing"]:
        if not native_status().available:
            print(native_status())
        return 0
    try:
        print(features().explain())
    except GraphwrightError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
