"""Rounding methods: each chooses codes for weights of any :class:`~graphwright.passes.quantization.formats.Format`."""

from __future__ import annotations

import difflib
import importlib

from graphwright.ir.errors import InputError
from graphwright.passes.quantization.rounding.base import BlockRounding, Codes, InputRounding, Rounding, WeightRounding

__all__ = ["METHODS", "BlockRounding", "Codes", "InputRounding", "Rounding", "WeightRounding", "rounding_of"]

# method -> module of this package and class
METHODS: dict[str, tuple[str, str]] = {
    "awq-clip": ("clipped", "ClippedNearest"),
    "autoround": ("autoround", "AutoRound"),
    "gptq": ("gptq", "Gptq"),
    "hqq": ("hqq", "Hqq"),
    "nearest": ("nearest", "Nearest"),
}


def rounding_of(given: object, *, where: str) -> Rounding:
    """A method by its name, with the options' defaults, or as it is.

    Raises:
        InputError: there is none of that name.
    """
    if isinstance(given, Rounding):
        return given
    if given not in METHODS or not isinstance(given, str):
        near = difflib.get_close_matches(str(given), METHODS, n=1)
        raise InputError(
            f"must be one of {', '.join(map(repr, METHODS))} or a Rounding, not {given!r}",
            where=where,
            hint=f"did you mean {near[0]!r}?" if near else "a method with options is made like Gptq(damping=0.1)",
        )
    module, name = METHODS[given]
    found: type[Rounding] = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    return found()
