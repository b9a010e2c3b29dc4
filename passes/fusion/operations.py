"""Operators that compute elements: constants, comparisons, logic, arithmetic and choices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from graphwright.ir.names import op_name
from graphwright.ir.types import VAL, fake_of
from graphwright.passes.cleanup.casts import CASTS
from graphwright.passes.fusion.calculation import FORMS, calculated, compared, constant, number_of, of_dtype
from graphwright.passes.fusion.symbolic import (
    AtLeastZero,
    Element,
    Handler,
    Holds,
    Index,
    Linear,
    Sum,
    Truth,
    Value,
    choice,
    every,
    negation,
    size_of,
    some,
    through_choices,
    truth_of,
)

if TYPE_CHECKING:
    from graphwright.passes.fusion.elements import Elements

# A stored table is only looked into when it has at most this many elements.
_MOST_STORED = 1 << 26

# operator that makes a tensor of equal values -> the value, or the name of the argument that holds it
_FILLS: dict[str, float | str] = {
    "aten.ones": 1,
    "aten.ones_like": 1,
    "aten.new_ones": 1,
    "aten.zeros": 0,
    "aten.zeros_like": 0,
    "aten.new_zeros": 0,
    "aten.full": "fill_value",
    "aten.full_like": "fill_value",
    "aten.new_full": "fill_value",
    "aten.fill.Scalar": "value",
    "aten.scalar_tensor": "s",
}
_AND = frozenset({"__and__", "bitwise_and", "logical_and"})
_OR = frozenset({"__or__", "bitwise_or", "logical_or"})
_NOT = frozenset({"bitwise_not", "logical_not"})
_ARITHMETIC = frozenset({"add", "sub", "rsub", "mul", "div", "neg"})


def _arange(elements: Elements, node: fx.Node, arguments: dict[str, Any], index: Index) -> Value | None:
    start, step = arguments.get("start", 0), arguments.get("step", 1)
    if fake_of(node).dtype.is_floating_point or not isinstance(step, int) or isinstance(start, float):
        return None
    first = size_of(start.meta[VAL]) if isinstance(start, fx.Node) else Linear((), start)
    return index[0] * step + first


def _filled(elements: Elements, node: fx.Node, arguments: dict[str, Any], index: Index) -> Value | None:
    fill = _FILLS[op_name(node)]
    value = arguments[fill] if isinstance(fill, str) else fill
    return None if isinstance(value, fx.Node) else of_dtype(constant(value), fake_of(node).dtype)


def _triangle(elements: Elements, node: fx.Node, arguments: dict[str, Any], index: Index) -> Value | None:
    diagonal = arguments["diagonal"]
    if not isinstance(diagonal, int):
        return None
    above = AtLeastZero(index[-1] - index[-2] - diagonal)
    kept = above if op_name(node) == "aten.triu" else AtLeastZero(index[-2] - index[-1] + diagonal)
    zero = of_dtype(Linear(), fake_of(node).dtype)
    return _chosen(elements.simplified(kept), elements.at(arguments["self"], index), zero, node)


def _where(elements: Elements, node: fx.Node, arguments: dict[str, Any], index: Index) -> Value | None:
    condition = _truth(elements, arguments["condition"], node, index)
    yes, no = (elements.broadcast(arguments[name], node, index) for name in ("self", "other"))
    if condition is None or yes is None or no is None:
        return None
    return _chosen(condition, yes, no, node)


def _masked_fill(elements: Elements, node: fx.Node, arguments: dict[str, Any], index: Index) -> Value | None:
    condition = _truth(elements, arguments["mask"], node, index)
    value, kept = (elements.broadcast(arguments[name], node, index) for name in ("value", "self"))
    if condition is None or value is None or kept is None:
        return None
    return _chosen(condition, value, kept, node)


def _chosen(condition: Truth, yes: Value, no: Value, node: fx.Node) -> Value | None:
    dtype = fake_of(node).dtype
    if dtype != torch.bool:
        return choice(condition, of_dtype(yes, dtype), of_dtype(no, dtype))
    left, right = truth_of(yes), truth_of(no)
    if left is None or right is None:
        return None
    return some(every(condition, left), every(negation(condition), right))


def _logic(elements: Elements, node: fx.Node, arguments: dict[str, Any], index: Index) -> Value | None:
    name = op_name(node).split(".")[1]
    operands = list(arguments.values())[: 1 if name in _NOT else 2]
    if fake_of(node).dtype != torch.bool:
        return None
    truths = [_truth(elements, operand, node, index) for operand in operands]
    known = [truth for truth in truths if truth is not None]
    if len(known) != len(truths):
        return None
    if name in _NOT:
        return negation(known[0])
    return every(*known) if name in _AND else some(*known)


def _compared(elements: Elements, node: fx.Node, arguments: dict[str, Any], index: Index) -> Value | None:
    name = op_name(node).split(".")[1]
    left, right = (elements.broadcast(operand, node, index) for operand in list(arguments.values())[:2])
    if left is None or right is None:
        return None

    def compare(a: Value, b: Value) -> Value | None:
        found = compared(name, a, b)
        return None if found is None else elements.simplified(found)

    found = through_choices(compare, _as_number(left), _as_number(right))
    return truth_of(found) if found is not None else None


def _cast(elements: Elements, node: fx.Node, arguments: dict[str, Any], index: Index) -> Value | None:
    source, dtype = node.args[0], fake_of(node).dtype
    assert isinstance(source, fx.Node)
    value, before = elements.at(source, index), fake_of(source).dtype
    if dtype == before:
        return value
    if dtype == torch.bool:
        return truth_of(value)
    return through_choices(lambda item: _converted(item, before, dtype), _as_binary(elements, value))


def _converted(value: Value, before: torch.dtype, dtype: torch.dtype) -> Value | None:
    """A value that does not branch, in another dtype, where that does not change it."""
    if dtype.is_floating_point and number_of(value) is not None:
        return of_dtype(value, dtype)
    kept = not dtype.is_floating_point and not before.is_floating_point
    return value if isinstance(value, Linear) and kept else None


def _arithmetic(elements: Elements, node: fx.Node, arguments: dict[str, Any], index: Index) -> Value | None:
    name, dtype = op_name(node).split(".")[1], fake_of(node).dtype
    if dtype == torch.bool:
        truths = [_truth(elements, item, node, index) for item in list(arguments.values())[:2]]
        known = [truth for truth in truths if truth is not None]
        return every(*known) if name == "mul" and len(known) == 2 else None
    if arguments.get("alpha", 1) != 1 or arguments.get("rounding_mode") is not None:
        return None
    values = [elements.broadcast(item, node, index) for item in list(arguments.values())[: 1 if name == "neg" else 2]]
    operands = [item if item is None else _as_binary(elements, item) for item in values]
    if any(item is None for item in operands):
        return None
    known_operands = [item for item in operands if item is not None]
    found = through_choices(lambda *items: calculated(name, dtype, items), *known_operands)
    if found is None and name == "add" and dtype.is_floating_point:
        return Sum(tuple(known_operands))
    return found


def _truth(elements: Elements, operand: Any, node: fx.Node, index: Index) -> Truth | None:
    value = elements.broadcast(operand, node, index)
    return None if value is None else truth_of(value)


def _as_binary(elements: Elements, value: Value) -> Value:
    """A truth that is calculated with, or an element of an integer input, as the zero or one it is taken for."""
    if not isinstance(value, Element):
        return _as_number(value)
    dtype = fake_of(value.node).dtype
    if dtype == torch.bool:
        return _as_number(Holds(value))
    if not elements.binary_inputs or value.node.op != "placeholder" or dtype.is_floating_point:
        return value
    elements.assumed = True
    return _as_number(Holds(value))


def stored(elements: Elements, node: fx.Node, index: Index) -> Value | None:
    """A constant table that is uniform, or one value on and below the diagonal and another above it."""
    table = elements.program.tensor(node)
    if isinstance(table, nn.Parameter) or not 0 < table.numel() <= _MOST_STORED or table.is_complex():
        return None
    table = table.detach()
    low = table.flatten()[0].item()
    if bool((table == low).all()):
        return of_dtype(constant(low), table.dtype)
    if table.dim() < 2 or table.shape[-1] < 2:
        return None
    high = table[..., 0, 1].flatten()[0].item()
    below = torch.ones(table.shape[-2:], dtype=torch.bool, device=table.device).tril()
    wanted = torch.full_like(table, high).masked_fill(below, low)
    if not torch.equal(table, wanted):
        return None
    yes, no = (of_dtype(constant(value), table.dtype) for value in (low, high))
    under = elements.simplified(AtLeastZero(index[-2] - index[-1]))
    if table.dtype == torch.bool:
        return under if low else negation(under)
    return choice(under, yes, no)


def _as_number(value: Value) -> Value:
    return choice(value, Linear((), 1), Linear()) if isinstance(value, Truth) else value


def _differences(elements: Elements, node: fx.Node, arguments: dict[str, Any], index: Index) -> Value | None:
    """Differences of neighbours, the first one to an element put before."""
    source, before = arguments["self"], arguments["prepend"]
    dtype, axis = fake_of(node).dtype, arguments["dim"] % len(index)
    if arguments["n"] != 1 or arguments["append"] is not None or dtype.is_floating_point or dtype == torch.bool:
        return None
    put_before = 0 if before is None else fake_of(before).shape[axis]
    if not isinstance(put_before, int) or put_before > 1:
        return None

    def element(of: fx.Node, place: Linear) -> Value:
        return elements.at(of, (*index[:axis], place, *index[axis + 1 :]))

    def difference(left: Value, right: Value) -> Value | None:
        return through_choices(lambda a, b: calculated("sub", dtype, (a, b)), left, right)

    here = index[axis]
    if not put_before:
        return difference(element(source, here + 1), element(source, here))
    first = difference(element(source, Linear()), element(before, Linear()))
    others = difference(element(source, here), element(source, here - 1))
    if first is None or others is None:
        return None
    return choice(elements.simplified(AtLeastZero(here * -1)), first, others)


def _accumulated(elements: Elements, node: fx.Node, arguments: dict[str, Any], index: Index) -> Value | None:
    """Sums of what stands before, of equal integers."""
    source, axis = arguments["self"], arguments["dim"] % len(index)
    if fake_of(node).dtype.is_floating_point:
        return None
    # Wherever along the axis: an index of its own, which must not matter.
    name = f"~{len(elements.ranges)}"
    elements.ranges[name] = size_of(fake_of(source).shape[axis])
    value = _as_number(elements.at(source, (*index[:axis], Linear(((name, 1),)), *index[axis + 1 :])))
    if not isinstance(value, Linear) or not value.is_constant:
        return None
    place: Linear = index[axis]
    return (place + 1) * value.constant


HANDLERS: dict[str, Handler] = {
    **dict.fromkeys(CASTS, _cast),
    **dict.fromkeys(_FILLS, _filled),
    **dict.fromkeys(FORMS, _compared),
    **dict.fromkeys(_AND | _OR | _NOT, _logic),
    **dict.fromkeys(_ARITHMETIC, _arithmetic),
    "arange": _arange,
    "aten.cumsum": _accumulated,
    "aten.diff": _differences,
    "aten.triu": _triangle,
    "aten.tril": _triangle,
    "where": _where,
    "masked_fill": _masked_fill,
}
