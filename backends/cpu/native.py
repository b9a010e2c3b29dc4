"""Whether the C++ extension is there, and if not, why not. Importing this never fails."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from functools import cache

_EXTENSION = "graphwright.backends.cpu._native"


@dataclass(frozen=True)
class NativeStatus:
    """Whether the native extension can be used.

    Attributes:
        available: whether it was found and loaded.
        message: one sentence for a person: where it is, or why it is not there.
        hint: what to do to get it; empty where it is there.
    """

    available: bool
    message: str
    hint: str = ""

    def __str__(self) -> str:
        return f"{self.message}\n  -> {self.hint}" if self.hint else self.message


@cache
def native_status() -> NativeStatus:
    """Whether the native extension is there, with the reason if it is not. Looked up once per process."""
    if importlib.util.find_spec(_EXTENSION) is None:
        return NativeStatus(
            available=False,
            message="The C++ kernels are not in this installation of graphwright; CPU execution runs in PyTorch.",
            hint="install a C++20 compiler, then graphwright again; `pip install -v` shows why a build was given up",
        )
    try:
        module = importlib.import_module(_EXTENSION)
    except ImportError as error:
        return NativeStatus(
            available=False,
            message=f"The C++ kernels are installed but cannot be loaded ({error}); CPU execution runs in PyTorch.",
            hint="install graphwright again with this Python",
        )
    return NativeStatus(available=True, message=f"The C++ kernels are at {module.__file__}.")
