"""Arithmetic with a neutral element."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx, nn

from graphwright.ir.arguments import arguments_of
from graphwright.ir.names import op_name
from graphwright.ir.program import Program
from graphwright.ir.types import TensorType

# operator -> its neutral element, and whether it may be the first operand too
_NEUTRAL: dict[str, tuple[float | bool, bool]] = {
    "aten.add.Tensor": (0, True),
    "aten.sub.Tensor": (0, False),
    "aten.mul.Tensor": (1, True),
    "aten.div.Tensor": (1, False),
    "aten.pow.Tensor_Scalar": (1, False),
    "aten.__and__.Tensor": (True, True),
    "aten.bitwise_and.Tensor": (True, True),
    "aten.logical_and": (True, True),
    "aten.__or__.Tensor": (False, True),
    "aten.bitwise_or.Tensor": (False, True),
    "aten.logical_or": (False, True),
}

# operator that makes a tensor of equal values -> the value, or the name of the argument that holds it
_UNIFORM: dict[str, bool | str] = {
    "aten.ones": True,
    "aten.new_ones": True,
    "aten.ones_like": True,
    "aten.zeros": False,
    "aten.new_zeros": False,
    "aten.zeros_like": False,
    "aten.full": "fill_value",
    "aten.new_full": "fill_value",
    "aten.full_like": "fill_value",
    "aten.scalar_tensor": "s",
}

# A stored tensor is only looked into when it is this small.
_MOST_ELEMENTS = 64


def arithmetic_identity(program: Program, node: fx.Node) -> fx.Node | str | None:
    """The operand that an operator with a neutral element gives back."""
    neutral, either_side = _NEUTRAL.get(op_name(node), (None, False))
    if neutral is None:
        return None
    arguments = arguments_of(node)
    first, second = list(arguments.values())[:2]
    swapped = [(second, first)] if either_side and arguments.get("alpha", 1) == 1 else []
    for source, other in [(first, second), *swapped]:
        if not isinstance(source, fx.Node):
            continue
        constant = _uniform(program, other)
        if constant is None or constant != neutral or program.type_of(source) != program.type_of(node):
            continue
        return _objection(program, node, source, constant) or source
    return None


def _objection(program: Program, node: fx.Node, source: fx.Node, constant: float | bool) -> str | None:
    kind = program.type_of(source)
    assert isinstance(kind, TensorType)
    if isinstance(_NEUTRAL[op_name(node)][0], bool) and kind.dtype != torch.bool:
        return "the operands are integers, of which it takes the bits"
    floating = kind.dtype.is_floating_point or kind.dtype.is_complex
    if op_name(node) == "aten.add.Tensor" and floating and not _is_minus_zero(constant):
        return "x + 0.0 turns -0.0 into 0.0, so it is no identity on floats"
    if op_name(node) == "aten.sub.Tensor" and floating and _is_minus_zero(constant):
        return "x - (-0.0) turns -0.0 into 0.0, so it is no identity on floats"
    return None


def _is_minus_zero(value: float | bool) -> bool:
    return isinstance(value, float) and value == 0.0 and math.copysign(1.0, value) < 0


def _uniform(program: Program, value: Any) -> float | bool | None:
    """The one number that a constant consists of."""
    if isinstance(value, int | float):
        return value
    if not isinstance(value, fx.Node):
        return None
    if value.op == "get_attr":
        tensor = program.tensor(value)
        if isinstance(tensor, nn.Parameter) or not 0 < tensor.numel() <= _MOST_ELEMENTS or tensor.dtype.is_complex:
            return None
        numbers = tensor.flatten().tolist()
        first: float | bool = numbers[0]
        return first if all(number == first for number in numbers) else None
    fill = _UNIFORM.get(op_name(value))
    if isinstance(fill, str):
        fill = arguments_of(value).get(fill)
    return fill if isinstance(fill, int | float) else None
