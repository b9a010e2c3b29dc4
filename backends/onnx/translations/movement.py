"""Operators that move elements: transposes, slices, joins, splits, repeats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from graphwright.backends.onnx.lowering import Lowering
from graphwright.backends.onnx.sizes import Size, Sizes, size_argument, sizes_of
from graphwright.backends.onnx.translations import linear
from graphwright.ir.types import VAL

_INT64_MAX = 2**63 - 1
_SWAP_HEADS = [0, 2, 1, 3]
# torch's names of the padding modes and ONNX's.
_PAD_MODES = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def permute(lower: Lowering, node: fx.Node, x: fx.Node, dims: Sequence[int]) -> None:
    """ONNX Transpose, emitted when it is read; ``[B, S, H, D] <-> [B, H, S, D]`` keeps a way back."""
    rank = len(lower.shape(x))
    order = [dim % rank for dim in dims]
    if order == list(range(rank)):
        lower.set_elements(node, lower.elements(x))
        return
    source = lower.elements(x)
    if order == _SWAP_HEADS and source.swapped is not None:
        lower.set_elements(node, source.swapped)
        return
    shape, source_shape = lower.shape(node), lower.shape(x)

    def make() -> tuple[Sizes, ir.Value]:
        return shape, lower.graph.call("Transpose", source.get(source_shape), perm=order)

    lower.set_elements(node, lower.deferred(make, swapped=source if order == _SWAP_HEADS else None))


def transpose(lower: Lowering, node: fx.Node, x: fx.Node, dim0: int, dim1: int) -> None:
    """Swap two dimensions."""
    order = list(range(len(lower.shape(x))))
    if order:
        order[dim0], order[dim1] = order[dim1], order[dim0]
    permute(lower, node, x, order)


def t(lower: Lowering, node: fx.Node, x: fx.Node) -> None:
    """Transpose of a matrix."""
    permute(lower, node, x, list(reversed(range(len(lower.shape(x))))))


def movedim(lower: Lowering, node: fx.Node, x: fx.Node, source: int, destination: int) -> None:
    """Move one dimension."""
    rank = len(lower.shape(x))
    order = list(range(rank))
    order.insert(destination % rank, order.pop(source % rank))
    permute(lower, node, x, order)


def expand(lower: Lowering, node: fx.Node, x: fx.Node, *arguments: Any) -> None:
    """ONNX Expand, emitted when it is read."""
    del arguments
    shape = lower.shape(node)
    source = lower.elements(x)
    if shape == lower.shape(x):
        lower.set_elements(node, source)
        return
    lower.set_elements(
        node, lower.deferred(lambda: (shape, lower.graph.call("Expand", lower.tensor(x), lower.sizes.vector(shape))))
    )


def expand_as(lower: Lowering, node: fx.Node, x: fx.Node, other: fx.Node) -> None:
    """Broadcast to the shape of another tensor."""
    del other
    expand(lower, node, x)


def cat(lower: Lowering, node: fx.Node, tensors: Sequence[fx.Node], dim: int) -> None:
    """ONNX Concat; torch's legacy empty vectors among the operands are left out."""
    rank = len(lower.shape(node))
    parts = [part for part in tensors if lower.shape(part) != (0,) or rank == 1]
    values = [lower.tensor(part, lower.dtype(node)) for part in parts]
    lower.set(node, lower.graph.call("Concat", *values, axis=dim % rank))


def stack(lower: Lowering, node: fx.Node, tensors: Sequence[fx.Node], dim: int) -> None:
    """A new dimension, then Concat."""
    axis = dim % len(lower.shape(node))
    axes = lower.graph.integers(axis)
    values = [lower.graph.call("Unsqueeze", lower.tensor(part, lower.dtype(node)), axes) for part in tensors]
    lower.set(node, lower.graph.call("Concat", *values, axis=axis))


def slice(lower: Lowering, node: fx.Node, x: fx.Node, dim: int, start: Any, end: Any, step: Any) -> None:
    """ONNX Slice; a slice that keeps everything is none."""
    shape = lower.shape(x)
    first: Size = 0 if start is None else lower.size(node, start)
    last: Size = _INT64_MAX if end is None else lower.size(node, end)
    if lower.shape(node) == shape and first == 0 and step == 1:
        lower.set_elements(node, lower.elements(x))
        return
    _slice(lower, node, x, dim % len(shape), first, last, lower.size(node, step))


def _slice(lower: Lowering, node: fx.Node, x: fx.Node, axis: int, first: Size, last: Size, step: Size) -> None:
    vector = lower.sizes.vector
    value = lower.graph.call(
        "Slice", lower.tensor(x), vector((first,)), vector((last,)), lower.graph.integers(axis), vector((step,))
    )
    lower.set(node, value)


def narrow(lower: Lowering, node: fx.Node, x: fx.Node, dim: int, start: Any, length: Any) -> None:
    """``length`` elements from ``start`` on."""
    first = lower.size(node, start)
    last: Any = first + lower.size(node, length)
    _slice(lower, node, x, dim % len(lower.shape(x)), first, last, 1)


def select(lower: Lowering, node: fx.Node, x: fx.Node, dim: int, index: Any) -> None:
    """ONNX Gather of one index."""
    position = lower.operand(index, torch.int64)
    lower.set(node, lower.graph.call("Gather", lower.tensor(x), position, axis=dim % len(lower.shape(x))))


def _parts(lower: Lowering, node: fx.Node, x: fx.Node, axis: int) -> list[ir.Value]:
    sizes = [sizes_of(fake)[axis] for fake in node.meta[VAL]]
    if len(sizes) == 1:
        return [lower.tensor(x)]
    value, vector = lower.tensor(x), lower.sizes.vector(tuple(sizes))
    return list(lower.graph.call_many("Split", value, vector, count=len(sizes), axis=axis))


def split(lower: Lowering, node: fx.Node, x: fx.Node, size: Any, dim: int = 0) -> None:
    """ONNX Split, with the part sizes torch has inferred."""
    del size
    if linear.is_taken_apart(x):
        lower.set_tuple(node, linear.parts(lower, node, x))
        return
    values = _parts(lower, node, x, dim % len(lower.shape(x)))
    lower.set_tuple(node, list(zip([sizes_of(fake) for fake in node.meta[VAL]], values, strict=True)))


split_with_sizes = chunk = split


def unbind(lower: Lowering, node: fx.Node, x: fx.Node, dim: int) -> None:
    """One Gather for every index."""
    axis = dim % len(lower.shape(x))
    value = lower.tensor(x)
    positions = [lower.graph.constant(index, torch.int64) for index in range(len(node.meta[VAL]))]
    values = [lower.graph.call("Gather", value, position, axis=axis) for position in positions]
    lower.set_tuple(node, list(zip([sizes_of(fake) for fake in node.meta[VAL]], values, strict=True)))


def repeat(lower: Lowering, node: fx.Node, x: fx.Node, repeats: Sequence[Any]) -> None:
    """ONNX Tile."""
    shape = lower.shape(x)
    padded: Sizes = (1,) * (len(repeats) - len(shape)) + shape
    times = lower.sizes.vector(tuple(lower.size(node, each) for each in repeats))
    lower.set(node, lower.graph.call("Tile", lower.elements(x).get(padded), times))


def repeat_interleave(
    lower: Lowering, node: fx.Node, x: fx.Node, repeats: Any, dim: int | None = None, output_size: Any = None
) -> None:
    """Each element several times: a new dimension, expanded and folded."""
    del output_size
    times, shape = lower.size(node, repeats), lower.shape(x)
    axis = len(shape) - 1 if dim is None else dim % len(shape)
    if dim is None and len(shape) > 1:
        raise lower.refuse(node, "repeat_interleave without a dimension is exported for vectors only")
    opened: Sizes = (*shape[: axis + 1], 1, *shape[axis + 1 :])
    widened: Sizes = (*shape[: axis + 1], times, *shape[axis + 1 :])
    value = lower.graph.call("Expand", lower.elements(x).get(opened), lower.sizes.vector(widened))
    lower.set(node, value, widened)


def constant_pad_nd(lower: Lowering, node: fx.Node, x: fx.Node, pad: Sequence[Any], value: Any) -> None:
    """Padding with a number."""
    _pad(lower, node, x, pad, "constant", value)


def pad(
    lower: Lowering, node: fx.Node, x: fx.Node, pad: Sequence[Any], mode: str = "constant", value: Any = None
) -> None:
    """Padding with a number, or with what lies at the edges."""
    if mode not in _PAD_MODES:
        raise lower.refuse(node, f"padding of mode {mode!r} is not exported")
    _pad(lower, node, x, pad, _PAD_MODES[mode], 0 if value is None else value)


def _pad(lower: Lowering, node: fx.Node, x: fx.Node, pad: Sequence[Any], mode: str, value: Any) -> None:
    """ONNX Pad; torch lists pairs from the last dimension backwards."""
    rank = len(lower.shape(x))
    before: list[Size] = [0] * rank
    after: list[Size] = [0] * rank
    for index in range(len(pad) // 2):
        before[rank - 1 - index] = lower.size(node, pad[2 * index])
        after[rank - 1 - index] = lower.size(node, pad[2 * index + 1])
    dtype = lower.dtype(node)
    pads = lower.sizes.vector((*before, *after))
    fill = lower.operand(value, dtype) if mode == "constant" else None
    lower.set(node, lower.graph.call("Pad", lower.tensor(x), pads, fill, mode=mode))


def flip(lower: Lowering, node: fx.Node, x: fx.Node, dims: Sequence[int]) -> None:
    """ONNX Slice backwards."""
    rank, count = len(lower.shape(x)), len(dims)
    integers = lower.graph.integers
    starts, ends = integers(*[-1] * count), integers(*[-_INT64_MAX] * count)
    axes, steps = integers(*[dim % rank for dim in dims]), integers(*[-1] * count)
    lower.set(node, lower.graph.call("Slice", lower.tensor(x), starts, ends, axes, steps))


def roll(lower: Lowering, node: fx.Node, x: fx.Node, shifts: Sequence[Any], dims: Sequence[int]) -> None:
    """Two slices, joined the other way round, for every dimension."""
    if not dims:
        raise lower.refuse(node, "roll without dimensions is not exported", "pass dims= to torch.roll")
    value = lower.tensor(x)
    rank = len(lower.shape(x))
    for shift, dim in zip(shifts, dims, strict=True):
        amount = size_argument(shift)
        if not isinstance(amount, int) or amount == 0:
            raise lower.refuse(node, f"roll by {shift!r} is not exported")
        axis = lower.graph.integers(dim % rank)
        cut, zero, end = (lower.graph.integers(number) for number in (-amount, 0, _INT64_MAX))
        tail = lower.graph.call("Slice", value, cut, end, axis)
        head = lower.graph.call("Slice", value, zero, cut, axis)
        value = lower.graph.call("Concat", tail, head, axis=dim % rank)
    lower.set(node, value)
