"""Queries, keys and values that one linear gives side by side, which the attention takes as they are."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from graphwright.backends.onnx.lowering import Lowering
from graphwright.backends.onnx.sizes import size_argument, sizes_of
from graphwright.backends.onnx.translations.heads import joined_shape
from graphwright.backends.onnx.translations.linear import SPLITS
from graphwright.ir.arguments import argument
from graphwright.ir.names import op_name
from graphwright.ir.types import VAL

_VIEWS = frozenset({"aten.view", "aten.reshape", "aten._unsafe_view", "aten.unflatten.int"})


@dataclass(frozen=True)
class _Part:
    """Features ``start`` to ``stop`` of the last dimension of a value."""

    source: fx.Node
    start: int
    stop: int


def find_packed(lower: Lowering, query: fx.Node, key: fx.Node, value: fx.Node) -> fx.Node | None:
    """The value ``[B, S, (Hq + 2 Hkv) D]`` of which queries, keys and values ``[B, H, S, D]`` are the parts in turn.

    ``None`` when they come from several values, lie in another order, or something else lies between.
    """
    parts = [_part(lower, each) for each in (query, key, value)]
    stop, source = 0, parts[0].source if parts[0] is not None else None
    for part in parts:
        if part is None or part.source is not source or part.start != stop:
            return None
        stop = part.stop
    return source if source is not None and lower.shape(source)[-1] == stop else None


def _part(lower: Lowering, heads: fx.Node) -> _Part | None:
    if op_name(heads) != "aten.transpose.int" or {argument(heads, "dim0"), argument(heads, "dim1")} != {1, 2}:
        return None
    apart: fx.Node = argument(heads, "self")
    if op_name(apart) not in _VIEWS:
        return None
    piece: fx.Node = argument(apart, "self")
    if lower.shape(piece) != joined_shape(lower.shape(heads)):
        return None
    width = lower.shape(piece)[-1]
    if op_name(piece) == "aten.slice.Tensor":
        source: fx.Node = argument(piece, "self")
        start = size_argument(argument(piece, "start") or 0)
        if argument(piece, "dim") not in (2, -1) or argument(piece, "step") != 1:
            return None
        return _Part(source, start, start + width) if isinstance(start, int) and start >= 0 else None
    if op_name(piece) != "py.getitem":
        return None
    split, index = piece.args
    if not isinstance(split, fx.Node) or not isinstance(index, int):
        return None
    if op_name(split) not in SPLITS or argument(split, "dim") not in (2, -1):
        return None
    sizes = [sizes_of(fake)[-1] for fake in split.meta[VAL]]
    start = sum(sizes[:index])
    return _Part(argument(split, SPLITS[op_name(split)]), start, start + width)
