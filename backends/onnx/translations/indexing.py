"""Reading by index: embeddings, gathers, advanced indexing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from graphwright.backends.onnx.lowering import Lowering
from graphwright.backends.onnx.sizes import Sizes


def embedding(lower: Lowering, node: fx.Node, table: fx.Node, indices: fx.Node, *arguments: Any) -> None:
    """ONNX Gather of rows. ``padding_idx`` and sparsity only matter for gradients."""
    del arguments
    lower.set(node, lower.graph.call("Gather", lower.tensor(table), lower.tensor(indices), axis=0))


def index_select(lower: Lowering, node: fx.Node, x: fx.Node, dim: int, index: fx.Node) -> None:
    """ONNX Gather."""
    lower.set(node, lower.graph.call("Gather", lower.tensor(x), lower.tensor(index), axis=dim % len(lower.shape(x))))


def gather(lower: Lowering, node: fx.Node, x: fx.Node, dim: int, index: fx.Node, sparse_grad: bool = False) -> None:
    """ONNX GatherElements, on as much of x as torch reads."""
    del sparse_grad
    axis = dim % len(lower.shape(x))
    value = lower.tensor(x)
    for other, (size, read) in enumerate(zip(lower.shape(x), lower.shape(index), strict=True)):
        if other != axis and size != read:
            bounds = [lower.graph.integers(0), lower.sizes.vector((read,)), lower.graph.integers(other)]
            value = lower.graph.call("Slice", value, *bounds)
    lower.set(node, lower.graph.call("GatherElements", value, lower.tensor(index), axis=axis))


def index(lower: Lowering, node: fx.Node, x: fx.Node, indices: Sequence[fx.Node | None]) -> None:
    """Advanced indexing: Gather for one index, GatherND for several.

    Raises:
        ExportError: the index is a mask, or the indexed dimensions do not lie side by side.
    """
    axes = [axis for axis, each in enumerate(indices) if each is not None]
    given = [each for each in indices if each is not None]
    if any(lower.dtype(each) == torch.bool for each in given):
        raise lower.refuse(node, "a boolean mask gives a size that depends on data", "use torch.where or gather")
    value = lower.tensor(x)
    if len(given) == 1:
        lower.set(node, lower.graph.call("Gather", value, lower.tensor(given[0], torch.int64), axis=axes[0]))
        return
    first, count, rank = axes[0], len(axes), len(lower.shape(x))
    if axes != list(range(first, first + count)):
        raise lower.refuse(node, "indexing of dimensions that do not lie side by side is not exported")
    # GatherND indexes the leading dimensions: bring the indexed ones there, and the result's back behind the rest.
    if first:
        order = [*axes, *[axis for axis in range(rank) if axis not in axes]]
        value = lower.graph.call("Transpose", value, perm=order)
    shape = _broadcast([lower.shape(each) for each in given])
    result = lower.graph.call("GatherND", value, _positions(lower, given, shape))
    if first:
        width = len(shape)
        order = [*range(width, width + first), *range(width), *range(width + first, len(lower.shape(node)))]
        result = lower.graph.call("Transpose", result, perm=order)
    lower.set(node, result)


def _positions(lower: Lowering, given: Sequence[fx.Node], shape: Sizes) -> ir.Value:
    last = lower.graph.integers(-1)
    columns: list[ir.Value] = []
    for each in given:
        value = lower.tensor(each, torch.int64)
        if lower.shape(each) != shape:
            value = lower.graph.call("Expand", value, lower.sizes.vector(shape))
        columns.append(lower.graph.call("Unsqueeze", value, last))
    return lower.graph.call("Concat", *columns, axis=-1)


def _broadcast(shapes: Sequence[Sizes]) -> Sizes:
    rank = max(len(shape) for shape in shapes)
    padded = [(1,) * (rank - len(shape)) + shape for shape in shapes]
    return tuple(next((size for size in sizes if size != 1), 1) for sizes in zip(*padded, strict=True))
