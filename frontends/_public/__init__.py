"""graphwright: compiler passes for PyTorch and ONNX models, each one checked numerically the moment it has run.

This file is installed as ``graphwright/__init__.py``. It imports nothing until a name is asked for, so that
``import graphwright`` and the command line's ``--help`` stay instant. To export a name, add it twice: to the
imports that type checkers read, and to ``_EXPORTS``; ``tests/test_packaging.py`` holds the two against each other.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from graphwright.ir.errors import GraphwrightError as GraphwrightError
    from graphwright.ir.errors import InputError as InputError

    __version__: str

# exported name -> the module that defines it
_EXPORTS: dict[str, str] = {
    "GraphwrightError": "graphwright.ir.errors",
    "InputError": "graphwright.ir.errors",
}


if not TYPE_CHECKING:  # else every misspelt name would pass the type checker

    def __getattr__(name: str) -> object:
        if name == "__version__":
            from importlib.metadata import version

            value: object = version("graphwright")
        elif name in _EXPORTS:
            value = getattr(import_module(_EXPORTS[name]), name)
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value  # the next look-up does not come here again
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS, "__version__"})
