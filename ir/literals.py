"""Constants and operands as text: ``1e-12``, ``f32``, ``[%x, None]``, ``device("cpu")``."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from graphwright.ir.types import DTYPE_NAMES


def format_value(value: Any) -> str:
    """An argument as it is written: a node, a constant, or a sequence of them."""
    if isinstance(value, fx.Node):
        return f"%{value.name}"
    if value is None or isinstance(value, bool):
        return str(value)
    if isinstance(value, float):
        return format_float(value)
    if isinstance(value, int) and not isinstance(value, torch.SymInt):
        return repr(int(value))
    if isinstance(value, complex):
        return f"complex({format_float(value.real)}, {format_float(value.imag)})"
    if isinstance(value, str):
        return json.dumps(value)
    if isinstance(value, torch.dtype):
        return DTYPE_NAMES.get(value, str(value))
    if isinstance(value, torch.layout | torch.memory_format):
        return str(value)
    if isinstance(value, torch.device):
        return f"device({json.dumps(str(value))})"
    if isinstance(value, list):
        return f"[{', '.join(map(format_value, value))}]"
    if isinstance(value, tuple):
        return f"({', '.join(map(format_value, value))}{',' if len(value) == 1 else ''})"
    return f"?{json.dumps(repr(value))}"


def has_written_form(value: Any) -> bool:
    """Whether what :func:`format_value` writes can be read back. Nodes can; mappings are looked into."""
    if isinstance(value, Mapping):
        return all(map(has_written_form, value.values()))
    if isinstance(value, list | tuple):
        return all(map(has_written_form, value))
    return isinstance(value, fx.Node) or not format_value(value).startswith("?")


def format_float(value: float) -> str:
    """The shortest text that reads back as the same float: ``1e-12``, ``-0.0``, ``inf``, ``nan``."""
    if math.isnan(value):
        return "nan"
    return repr(float(value))
