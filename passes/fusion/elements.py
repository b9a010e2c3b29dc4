"""What one element of a tensor is, found by reading the operators that made it backwards from an index.

``Elements(program, sizes).at(node, index)`` follows views, index arithmetic, comparisons, logic and the like. Where it
meets anything else, or anything it cannot be sure of, it stops at an :class:`Element`, so what it says is sound.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import fx, nn

from graphwright.ir.arguments import arguments_of
from graphwright.ir.names import op_name
from graphwright.ir.program import Program
from graphwright.ir.types import VAL, fake_of, is_tensor
from graphwright.passes.cleanup.casts import CASTS
from graphwright.passes.cleanup.effects import is_idle_dropout
from graphwright.passes.cleanup.views import permutation
from graphwright.passes.fusion.calculation import FORMS, calculated, compared, constant, number_of, of_dtype
from graphwright.passes.fusion.reshapes import source_index
from graphwright.passes.fusion.symbolic import (
    AtLeastZero,
    Element,
    Every,
    Holds,
    Known,
    Linear,
    Some,
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

Index = tuple[Linear, ...]
_Handler = Callable[[fx.Node, dict[str, Any], Index], Value | None]

# A stored table is only looked into when it has at most this many elements.
_MOST_STORED = 1 << 26

_COPIES = frozenset({"aten.clone", "aten.contiguous", "aten.alias", "aten.detach", "aten.lift_fresh_copy"})
_RESHAPES = frozenset(
    {
        "aten.view",
        "aten.reshape",
        "aten._unsafe_view",
        "aten.squeeze",
        "aten.squeeze.dim",
        "aten.squeeze.dims",
        "aten.unsqueeze",
        "aten.flatten.using_ints",
        "aten.unflatten.int",
        "aten.view_as",
        "aten.reshape_as",
    }
)
_EXPANDS = frozenset({"aten.expand", "aten.expand_as", "aten.broadcast_to"})
_PERMUTATIONS = frozenset({"aten.transpose.int", "aten.permute", "aten.mT", "aten.t", "aten.swapaxes"})
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


class Elements:
    """Elements of a program's tensors as symbolic values.

    Args:
        program: only read.
        ranges: the indices that may be used, each with the size that it stays below.
        binary_inputs: take inputs of integers that are calculated with for zeros and ones.

    Attributes:
        places: every value found so far, with the nodes and indices at which it stands.
        assumed: whether an input was taken for zeros and ones.
    """

    _memo: dict[tuple[fx.Node, Index], Value]

    def __init__(self, program: Program, ranges: Mapping[str, Linear], *, binary_inputs: bool = False) -> None:
        self.program = program
        self.ranges = dict(ranges)
        self.binary_inputs = binary_inputs
        self.places: dict[Value, list[tuple[fx.Node, Index]]] = {}
        self.assumed = False
        self._memo = {}

    def at(self, value: Any, index: Index) -> Value:
        """The element of a node's tensor at an index, or a number as a value."""
        if not isinstance(value, fx.Node):
            return constant(value)
        if not is_tensor(value):
            size = value.meta.get(VAL)
            return size_of(size) if isinstance(size, int | torch.SymInt) else Element(value, index)
        key = (value, index)
        if key not in self._memo:
            found = self._evaluate(value, index)
            found = Element(value, index) if found is None else found
            self._memo[key] = found
            self.places.setdefault(found, []).append(key)
        return self._memo[key]

    def broadcast(self, value: Any, node: fx.Node, index: Index) -> Value | None:
        """An operand's element where the result is at ``index``; ``None`` when it is not plain how it is broadcast."""
        if not isinstance(value, fx.Node) or not is_tensor(value):
            return self.at(value, ())
        own, result = fake_of(value).shape, fake_of(node).shape
        skipped = len(result) - len(own)
        found: list[Linear] = []
        for axis, size in enumerate(own):
            if isinstance(size, int) and size == 1:
                found.append(Linear())
            elif size_of(size) == size_of(result[axis + skipped]):
                found.append(index[axis + skipped])
            else:
                return None
        return self.at(value, tuple(found))

    def is_at_least_zero(self, form: Linear) -> bool:
        """Whether a form is never negative, whatever the indices and sizes."""
        lowest = Linear((), form.constant)
        for name, coefficient in form.terms:
            if name not in self.ranges:
                lowest += Linear(((name, coefficient),))
            elif coefficient < 0:
                lowest += (self.ranges[name] - 1) * coefficient
        # What is left are sizes; those of dimensions are at least one.
        if any(coefficient < 0 or not name.startswith("#") for name, coefficient in lowest.terms):
            return False
        return lowest.constant + sum(coefficient for _, coefficient in lowest.terms) >= 0

    def simplified(self, truth: Truth) -> Truth:
        """The truth without the conditions that always hold."""
        if isinstance(truth, Every):
            return every(*map(self.simplified, truth.parts))
        if isinstance(truth, Some):
            return some(*map(self.simplified, truth.parts))
        if not isinstance(truth, AtLeastZero):
            return truth
        if self.is_at_least_zero(truth.form):
            return Known(True)
        return Known(False) if self.is_at_least_zero(truth.form * -1 - 1) else truth

    @property
    def read(self) -> tuple[tuple[fx.Node, Index], ...]:
        """Every node that was read, and where."""
        return tuple(self._memo)

    # -- operators -------------------------------------------------------------------------------------------------

    def _evaluate(self, node: fx.Node, index: Index) -> Value | None:
        if node.op == "get_attr":
            return self._stored(node, index)
        if node.op != "call_function":
            return None
        name = op_name(node)
        arguments = arguments_of(node)
        handler = self._HANDLERS.get(name) or self._HANDLERS.get(name.split(".")[1])
        return handler(self, node, arguments, index) if handler is not None else None

    def _copied(self, node: fx.Node, arguments: dict[str, Any], index: Index) -> Value | None:
        return self.at(node.args[0], index)

    def _dropout(self, node: fx.Node, arguments: dict[str, Any], index: Index) -> Value | None:
        return self.at(node.args[0], index) if is_idle_dropout(node) else None

    def _reshaped(self, node: fx.Node, arguments: dict[str, Any], index: Index) -> Value | None:
        source = arguments["self"]
        found = source_index(fake_of(source).shape, fake_of(node).shape, index, self.is_at_least_zero)
        return self.at(source, found) if found is not None else None

    def _expanded(self, node: fx.Node, arguments: dict[str, Any], index: Index) -> Value | None:
        return self.broadcast(arguments["self"], node, index)

    def _permuted(self, node: fx.Node, arguments: dict[str, Any], index: Index) -> Value | None:
        order = permutation(self.program, node)
        if order is None:
            return None
        found = [Linear()] * len(index)
        for axis, origin in enumerate(order):
            found[origin] = index[axis]
        return self.at(node.args[0], tuple(found))

    def _sliced(self, node: fx.Node, arguments: dict[str, Any], index: Index) -> Value | None:
        axis, start, step = arguments["dim"] % len(index), arguments["start"], arguments["step"]
        size = fake_of(arguments["self"]).shape[axis]
        if isinstance(start, int) and start < 0:
            start = max(start + size, 0) if isinstance(size, int) else None
        elif start is None:
            start = 0
        first = size_of(start.meta[VAL]) if isinstance(start, fx.Node) else Linear((), start or 0)
        if start is None or not isinstance(step, int) or not self.is_at_least_zero(first):
            return None
        return self.at(arguments["self"], (*index[:axis], index[axis] * step + first, *index[axis + 1 :]))

    def _selected(self, node: fx.Node, arguments: dict[str, Any], index: Index) -> Value | None:
        axis, place = arguments["dim"] % (len(index) + 1), arguments["index"]
        if not isinstance(place, int):
            return None
        first = Linear((), place) if place >= 0 else size_of(fake_of(arguments["self"]).shape[axis]) + place
        return self.at(arguments["self"], (*index[:axis], first, *index[axis:]))

    def _indexed(self, node: fx.Node, arguments: dict[str, Any], index: Index) -> Value | None:
        """``x[a, b]`` with tensors of integers on adjacent axes."""
        places = list(arguments["indices"])
        given = [axis for axis, place in enumerate(places) if place is not None]
        if given != list(range(given[0], given[0] + len(given))):
            return None
        if any(fake_of(places[axis]).dtype not in (torch.int64, torch.int32) for axis in given):
            return None
        rank = max(fake_of(places[axis]).dim() for axis in given)
        inside = index[given[0] : given[0] + rank]
        found: list[Linear] = []
        for axis in given:
            own = fake_of(places[axis]).shape
            tail = inside[rank - len(own) :]
            place = tuple(
                Linear() if isinstance(size, int) and size == 1 else part for size, part in zip(own, tail, strict=True)
            )
            value = self.at(places[axis], place)
            # A negative index counts from the end.
            if not isinstance(value, Linear) or not self.is_at_least_zero(value):
                return None
            found.append(value)
        return self.at(arguments["self"], (*index[: given[0]], *found, *index[given[0] + rank :]))

    def _arange(self, node: fx.Node, arguments: dict[str, Any], index: Index) -> Value | None:
        start, step = arguments.get("start", 0), arguments.get("step", 1)
        if fake_of(node).dtype.is_floating_point or not isinstance(step, int) or isinstance(start, float):
            return None
        first = size_of(start.meta[VAL]) if isinstance(start, fx.Node) else Linear((), start)
        return index[0] * step + first

    def _filled(self, node: fx.Node, arguments: dict[str, Any], index: Index) -> Value | None:
        fill = _FILLS[op_name(node)]
        value = arguments[fill] if isinstance(fill, str) else fill
        return None if isinstance(value, fx.Node) else of_dtype(constant(value), fake_of(node).dtype)

    def _triangle(self, node: fx.Node, arguments: dict[str, Any], index: Index) -> Value | None:
        diagonal = arguments["diagonal"]
        if not isinstance(diagonal, int):
            return None
        above = AtLeastZero(index[-1] - index[-2] - diagonal)
        kept = above if op_name(node) == "aten.triu" else AtLeastZero(index[-2] - index[-1] + diagonal)
        zero = of_dtype(Linear(), fake_of(node).dtype)
        return self._chosen(self.simplified(kept), self.at(arguments["self"], index), zero, node)

    def _where(self, node: fx.Node, arguments: dict[str, Any], index: Index) -> Value | None:
        condition = self._truth(arguments["condition"], node, index)
        yes, no = (self.broadcast(arguments[name], node, index) for name in ("self", "other"))
        if condition is None or yes is None or no is None:
            return None
        return self._chosen(condition, yes, no, node)

    def _masked_fill(self, node: fx.Node, arguments: dict[str, Any], index: Index) -> Value | None:
        condition = self._truth(arguments["mask"], node, index)
        value, kept = (self.broadcast(arguments[name], node, index) for name in ("value", "self"))
        if condition is None or value is None or kept is None:
            return None
        return self._chosen(condition, value, kept, node)

    def _chosen(self, condition: Truth, yes: Value, no: Value, node: fx.Node) -> Value | None:
        dtype = fake_of(node).dtype
        if dtype != torch.bool:
            return choice(condition, of_dtype(yes, dtype), of_dtype(no, dtype))
        left, right = truth_of(yes), truth_of(no)
        if left is None or right is None:
            return None
        return some(every(condition, left), every(negation(condition), right))

    def _logic(self, node: fx.Node, arguments: dict[str, Any], index: Index) -> Value | None:
        name = op_name(node).split(".")[1]
        operands = list(arguments.values())[: 1 if name in _NOT else 2]
        if fake_of(node).dtype != torch.bool:
            return None
        truths = [self._truth(operand, node, index) for operand in operands]
        known = [truth for truth in truths if truth is not None]
        if len(known) != len(truths):
            return None
        if name in _NOT:
            return negation(known[0])
        return every(*known) if name in _AND else some(*known)

    def _compared(self, node: fx.Node, arguments: dict[str, Any], index: Index) -> Value | None:
        name = op_name(node).split(".")[1]
        left, right = (self.broadcast(operand, node, index) for operand in list(arguments.values())[:2])
        if left is None or right is None:
            return None

        def compare(a: Value, b: Value) -> Value | None:
            found = compared(name, a, b)
            return None if found is None else self.simplified(found)

        found = through_choices(compare, _as_number(left), _as_number(right))
        return truth_of(found) if found is not None else None

    def _cast(self, node: fx.Node, arguments: dict[str, Any], index: Index) -> Value | None:
        source, dtype = node.args[0], fake_of(node).dtype
        assert isinstance(source, fx.Node)
        value, before = self.at(source, index), fake_of(source).dtype
        if dtype == before:
            return value
        if dtype == torch.bool:
            return truth_of(value)
        return through_choices(lambda item: self._converted(item, before, dtype), self._as_binary(value))

    def _converted(self, value: Value, before: torch.dtype, dtype: torch.dtype) -> Value | None:
        """A value that does not branch, in another dtype, where that does not change it."""
        if dtype.is_floating_point and number_of(value) is not None:
            return of_dtype(value, dtype)
        kept = not dtype.is_floating_point and not before.is_floating_point
        return value if isinstance(value, Linear) and kept else None

    def _arithmetic(self, node: fx.Node, arguments: dict[str, Any], index: Index) -> Value | None:
        name, dtype = op_name(node).split(".")[1], fake_of(node).dtype
        if dtype == torch.bool:
            truths = [self._truth(item, node, index) for item in list(arguments.values())[:2]]
            known = [truth for truth in truths if truth is not None]
            return every(*known) if name == "mul" and len(known) == 2 else None
        if arguments.get("alpha", 1) != 1 or arguments.get("rounding_mode") is not None:
            return None
        values = [self.broadcast(item, node, index) for item in list(arguments.values())[: 1 if name == "neg" else 2]]
        operands = [item if item is None else self._as_binary(item) for item in values]
        if any(item is None for item in operands):
            return None
        known_operands = [item for item in operands if item is not None]
        found = through_choices(lambda *items: calculated(name, dtype, items), *known_operands)
        if found is None and name == "add" and dtype.is_floating_point:
            return Sum(tuple(known_operands))
        return found

    def _truth(self, operand: Any, node: fx.Node, index: Index) -> Truth | None:
        value = self.broadcast(operand, node, index)
        return None if value is None else truth_of(value)

    def _as_binary(self, value: Value) -> Value:
        """A truth that is calculated with, or an element of an integer input, as the zero or one it is taken for."""
        if not isinstance(value, Element):
            return _as_number(value)
        dtype = fake_of(value.node).dtype
        if dtype == torch.bool:
            return _as_number(Holds(value))
        if not self.binary_inputs or value.node.op != "placeholder" or dtype.is_floating_point:
            return value
        self.assumed = True
        return _as_number(Holds(value))

    def _stored(self, node: fx.Node, index: Index) -> Value | None:
        """A constant table that is uniform, or one value on and below the diagonal and another above it."""
        table = self.program.tensor(node)
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
        under = self.simplified(AtLeastZero(index[-2] - index[-1]))
        if table.dtype == torch.bool:
            return under if low else negation(under)
        return choice(under, yes, no)

    _HANDLERS: ClassVar[dict[str, Callable[[Elements, fx.Node, dict[str, Any], Index], Value | None]]] = {
        **dict.fromkeys(_COPIES, _copied),
        **dict.fromkeys(_RESHAPES, _reshaped),
        **dict.fromkeys(_EXPANDS, _expanded),
        **dict.fromkeys(_PERMUTATIONS, _permuted),
        **dict.fromkeys(CASTS, _cast),
        **dict.fromkeys(_FILLS, _filled),
        **dict.fromkeys(FORMS, _compared),
        **dict.fromkeys(_AND | _OR | _NOT, _logic),
        **dict.fromkeys(_ARITHMETIC, _arithmetic),
        "aten.dropout": _dropout,
        "aten.slice.Tensor": _sliced,
        "aten.select.int": _selected,
        "aten.index.Tensor": _indexed,
        "arange": _arange,
        "aten.triu": _triangle,
        "aten.tril": _triangle,
        "where": _where,
        "masked_fill": _masked_fill,
    }


def _as_number(value: Value) -> Value:
    return choice(value, Linear((), 1), Linear()) if isinstance(value, Truth) else value
