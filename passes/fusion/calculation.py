"""Constants and arithmetic on symbolic values, rounded as the tensors that hold them would be."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from graphwright.passes.fusion.symbolic import AtLeastZero, Known, Linear, Number, Truth, Value, every, negation

# comparison -> the truth about two linear forms, and the answer for two numbers
FORMS: dict[str, Callable[[Linear, Linear], Truth]] = {
    "le": lambda a, b: AtLeastZero(b - a),
    "lt": lambda a, b: AtLeastZero(b - a - 1),
    "ge": lambda a, b: AtLeastZero(a - b),
    "gt": lambda a, b: AtLeastZero(a - b - 1),
    "eq": lambda a, b: every(AtLeastZero(a - b), AtLeastZero(b - a)),
    "ne": lambda a, b: negation(every(AtLeastZero(a - b), AtLeastZero(b - a))),
}
NUMBERS: dict[str, Callable[[float, float], bool]] = {
    "le": lambda a, b: a <= b,
    "lt": lambda a, b: a < b,
    "ge": lambda a, b: a >= b,
    "gt": lambda a, b: a > b,
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
}


def constant(value: Any) -> Value:
    """A Python number as a value."""
    if isinstance(value, bool):
        return Known(value)
    return Linear((), value) if isinstance(value, int) else Number(float(value))


def number_of(value: Value) -> float | None:
    """A value that is one number, as that number."""
    if isinstance(value, Number):
        return value.value
    return float(value.constant) if isinstance(value, Linear) and value.is_constant else None


def of_dtype(value: Value, dtype: torch.dtype) -> Value:
    """A constant as a tensor of that dtype holds it; other values as they are."""
    number = float(value.value) if isinstance(value, Known) else number_of(value)
    if number is None:
        return value
    if dtype == torch.bool:
        return Known(number != 0)
    if dtype.is_floating_point:
        return Number(float(torch.tensor(number, dtype=torch.float64).to(dtype)))
    return Linear((), int(number)) if math.isfinite(number) else value


def compared(name: str, left: Value, right: Value) -> Truth | None:
    """``left <name> right`` for values that do not branch."""
    if isinstance(left, Linear) and isinstance(right, Linear):
        return FORMS[name](left, right)
    first, second = number_of(left), number_of(right)
    return Known(NUMBERS[name](first, second)) if first is not None and second is not None else None


def calculated(name: str, dtype: torch.dtype, operands: tuple[Value, ...]) -> Value | None:
    """``add``, ``sub``, ``rsub``, ``mul``, ``div`` or ``neg`` of values that do not branch."""
    if dtype.is_floating_point:
        numbers = [number_of(item) for item in operands]
        plain = [number for number in numbers if number is not None]
        return _of_numbers(name, plain) if len(plain) == len(operands) else None
    forms = [item for item in operands if isinstance(item, Linear)]
    if len(forms) != len(operands) or name == "div":
        return None
    if name == "neg":
        return forms[0] * -1
    left, right = forms
    if name == "mul":
        factor, other = (left, right) if left.is_constant else (right, left)
        return other * factor.constant if factor.is_constant else None
    return left + right if name == "add" else left - right if name == "sub" else right - left


def _of_numbers(name: str, numbers: list[float]) -> Value | None:
    if name == "neg":
        return Number(-numbers[0])
    left, right = numbers
    if name == "div":
        return Number(left / right) if right else None
    found = {"add": left + right, "sub": left - right, "rsub": right - left, "mul": left * right}[name]
    return None if math.isnan(found) else Number(found)
