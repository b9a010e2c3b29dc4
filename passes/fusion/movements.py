"""Operators that only move elements: which element of their operand stands where."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from graphwright.ir.types import VAL, fake_of
from graphwright.passes.cleanup.effects import is_idle_dropout
from graphwright.passes.cleanup.views import permutation
from graphwright.passes.fusion.reshapes import source_index
from graphwright.passes.fusion.symbolic import Handler, Index, Linear, Value, size_of

if TYPE_CHECKING:
    from graphwright.passes.fusion.elements import Elements

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


def _copied(elements: Elements, node: fx.Node, arguments: dict[str, Any], index: Index) -> Value | None:
    return elements.at(node.args[0], index)


def _dropout(elements: Elements, node: fx.Node, arguments: dict[str, Any], index: Index) -> Value | None:
    return elements.at(node.args[0], index) if is_idle_dropout(node) else None


def _reshaped(elements: Elements, node: fx.Node, arguments: dict[str, Any], index: Index) -> Value | None:
    source = arguments["self"]
    found = source_index(fake_of(source).shape, fake_of(node).shape, index, elements.is_at_least_zero)
    return elements.at(source, found) if found is not None else None


def _expanded(elements: Elements, node: fx.Node, arguments: dict[str, Any], index: Index) -> Value | None:
    return elements.broadcast(arguments["self"], node, index)


def _permuted(elements: Elements, node: fx.Node, arguments: dict[str, Any], index: Index) -> Value | None:
    order = permutation(elements.program, node)
    if order is None:
        return None
    found = [Linear()] * len(index)
    for axis, origin in enumerate(order):
        found[origin] = index[axis]
    return elements.at(node.args[0], tuple(found))


def _sliced(elements: Elements, node: fx.Node, arguments: dict[str, Any], index: Index) -> Value | None:
    axis, start, step = arguments["dim"] % len(index), arguments["start"], arguments["step"]
    size = fake_of(arguments["self"]).shape[axis]
    if isinstance(start, int) and start < 0:
        start = max(start + size, 0) if isinstance(size, int) else None
    elif start is None:
        start = 0
    first = size_of(start.meta[VAL]) if isinstance(start, fx.Node) else Linear((), start or 0)
    if start is None or not isinstance(step, int) or not elements.is_at_least_zero(first):
        return None
    return elements.at(arguments["self"], (*index[:axis], index[axis] * step + first, *index[axis + 1 :]))


def _selected(elements: Elements, node: fx.Node, arguments: dict[str, Any], index: Index) -> Value | None:
    axis, place = arguments["dim"] % (len(index) + 1), arguments["index"]
    if not isinstance(place, int):
        return None
    first = Linear((), place) if place >= 0 else size_of(fake_of(arguments["self"]).shape[axis]) + place
    return elements.at(arguments["self"], (*index[:axis], first, *index[axis:]))


def _indexed(elements: Elements, node: fx.Node, arguments: dict[str, Any], index: Index) -> Value | None:
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
        value = elements.at(places[axis], place)
        # A negative index counts from the end.
        if not isinstance(value, Linear) or not elements.is_at_least_zero(value):
            return None
        found.append(value)
    return elements.at(arguments["self"], (*index[: given[0]], *found, *index[given[0] + rank :]))


def _repeated(elements: Elements, node: fx.Node, arguments: dict[str, Any], index: Index) -> Value | None:
    """``x.repeat(...)`` along axes of size 1."""
    source = arguments["self"]
    own = fake_of(source).shape
    counts = arguments["repeats"][len(index) - len(own) :]
    found: list[Linear] = []
    for size, count, place in zip(own, counts, index[len(index) - len(own) :], strict=True):
        if isinstance(size, int) and size == 1:
            found.append(Linear())
        elif isinstance(count, int) and count == 1:
            found.append(place)
        else:
            return None
    return elements.at(source, tuple(found))


HANDLERS: dict[str, Handler] = {
    **dict.fromkeys(_COPIES, _copied),
    **dict.fromkeys(_RESHAPES, _reshaped),
    **dict.fromkeys(_EXPANDS, _expanded),
    **dict.fromkeys(_PERMUTATIONS, _permuted),
    "aten.dropout": _dropout,
    "aten.slice.Tensor": _sliced,
    "aten.select.int": _selected,
    "aten.index.Tensor": _indexed,
    "aten.repeat": _repeated,
}
