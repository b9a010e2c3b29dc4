"""Whether an operand is of the kind that its place in an operator's schema takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from graphwright.ir.types import VAL

_NUMBERS = (int, float, complex, torch.SymInt, torch.SymFloat, torch.SymBool)
_INTEGERS = (int, torch.SymInt)

# Kind as torch writes it -> whether a constant or fake value is of that kind. Tensors may be given as numbers.
_KINDS: dict[str, Callable[[Any], bool]] = {
    "Tensor": lambda value: isinstance(value, (torch.Tensor, *_NUMBERS)),
    "int": lambda value: isinstance(value, _INTEGERS),
    "float": lambda value: isinstance(value, (*_INTEGERS, float, torch.SymFloat)),
    "number": lambda value: isinstance(value, _NUMBERS),
    "bool": lambda value: isinstance(value, bool | torch.SymBool),
    "str": lambda value: isinstance(value, str),
    "Device": lambda value: isinstance(value, torch.device | str),
    "ScalarType": lambda value: isinstance(value, torch.dtype),
    "Layout": lambda value: isinstance(value, torch.layout),
    "MemoryFormat": lambda value: isinstance(value, torch.memory_format),
    "NoneType": lambda value: value is None,
}


def misfit(value: Any, argument: Any) -> str | None:
    """Why an operand does not fit its place, or ``None``.

    Args:
        value: a node, a constant, or a list of them. A node without a type fits everywhere.
        argument: the place, ``torch._C.Argument``.
    """
    wanted = str(argument.real_type)
    if _fits(value, wanted, single=argument.N is not None):
        return None
    return f"{argument.name!r} takes {_written(wanted)}, not {_described(value)}"


def _fits(value: Any, wanted: str, *, single: bool = False) -> bool:
    if isinstance(value, fx.Node):
        if VAL not in value.meta:
            return True
        value = value.meta[VAL]
    outer, bracket, rest = wanted.partition("[")
    inner = rest[:-1]
    if bracket and outer == "Optional":
        return value is None or _fits(value, inner, single=single)
    if bracket and outer == "List":
        # A list of fixed length may be given as the one number it repeats.
        if single and not isinstance(value, list | tuple):
            return _fits(value, inner)
        return isinstance(value, list | tuple) and all(_fits(item, inner) for item in value)
    check = _KINDS.get(wanted)
    return check is None or check(value)


def _written(wanted: str) -> str:
    outer, bracket, rest = wanted.partition("[")
    if bracket and outer in ("Optional", "List"):
        inner = _written(rest[:-1])
        return f"{inner} or None" if outer == "Optional" else f"a list of ({inner})"
    return {"ScalarType": "dtype"}.get(wanted, wanted)


def _described(value: Any) -> str:
    if isinstance(value, fx.Node):
        return f"%{value.name}, which is {type(value.meta.get(VAL)).__name__}"
    return repr(value)
