"""Layer, RMS, group and batch normalisation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from graphwright.backends.onnx.elements import rows_of
from graphwright.backends.onnx.lowering import Lowering
from graphwright.backends.onnx.sizes import Sizes


def layer_norm(
    lower: Lowering,
    node: fx.Node,
    x: fx.Node,
    normalized: Sequence[Any],
    weight: fx.Node | None,
    bias: fx.Node | None,
    eps: float,
    *arguments: Any,
) -> None:
    """ONNX LayerNormalization, on rows where the input exists so.

    On ``[rows, width]`` onnxruntime keeps it apart from the residual addition before it: its fused kernel for the two
    is several times slower than both (CPU, 1.31).
    """
    del arguments
    width, dtype = tuple(lower.size(node, size) for size in normalized), lower.dtype(node)

    def emit(value: ir.Value) -> ir.Value:
        scale = lower.tensor(weight) if weight is not None else _ones(lower, width, dtype)
        shift = lower.tensor(bias) if bias is not None else None
        return lower.graph.call("LayerNormalization", value, scale, shift, axis=-len(width), epsilon=float(eps))

    _over_rows(lower, node, x, len(width), emit)


def rms_norm(
    lower: Lowering,
    node: fx.Node,
    x: fx.Node,
    normalized: Sequence[Any],
    weight: fx.Node | None,
    eps: float | None,
) -> None:
    """``aten.rms_norm``; without eps torch takes the smallest step of the dtype."""
    if len(normalized) != 1:
        raise lower.refuse(node, "rms_norm over several dimensions is not exported")
    dialect_rms_norm(lower, node, x, weight, torch.finfo(lower.dtype(x)).eps if eps is None else eps)


def dialect_rms_norm(lower: Lowering, node: fx.Node, x: fx.Node, weight: fx.Node | None, eps: float) -> None:
    """RMSNormalization from opset 23 on, SimplifiedLayerNormalization for the runtime before, else written out."""
    dtype, graph = lower.dtype(node), lower.graph
    width = lower.shape(x)[-1:]

    def emit(value: ir.Value) -> ir.Value:
        scale = lower.tensor(weight, dtype) if weight is not None else _ones(lower, width, dtype)
        if lower.options.has_attention:
            return graph.call("RMSNormalization", value, scale, axis=-1, epsilon=float(eps))
        if lower.options.has_contrib:
            return graph.call("SimplifiedLayerNormalization", value, scale, axis=-1, epsilon=float(eps), stash_type=1)
        wide = torch.promote_types(dtype, torch.float32)
        wide_value = lower.cast(value, dtype, wide)
        square = graph.call("ReduceMean", graph.call("Mul", wide_value, wide_value), graph.integers(-1), keepdims=1)
        root = graph.call("Sqrt", graph.call("Add", square, graph.constant(eps, wide)))
        normed = graph.call("Mul", graph.call("Div", wide_value, root), lower.cast(scale, dtype, wide))
        return lower.cast(normed, wide, dtype)

    _over_rows(lower, node, x, 1, emit)


def group_norm(
    lower: Lowering,
    node: fx.Node,
    x: fx.Node,
    groups: int,
    weight: fx.Node | None,
    bias: fx.Node | None,
    eps: float,
    *arguments: Any,
) -> None:
    """ONNX GroupNormalization."""
    del arguments
    channels, dtype = lower.shape(x)[1:2], lower.dtype(node)
    scale = lower.tensor(weight) if weight is not None else _ones(lower, channels, dtype)
    shift = lower.tensor(bias) if bias is not None else _filled(lower, channels, 0, dtype)
    value = lower.graph.call(
        "GroupNormalization", lower.tensor(x), scale, shift, num_groups=int(groups), epsilon=float(eps)
    )
    lower.set(node, value)


def batch_norm(
    lower: Lowering,
    node: fx.Node,
    x: fx.Node,
    weight: fx.Node | None,
    bias: fx.Node | None,
    mean: fx.Node | None,
    variance: fx.Node | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn: bool,
) -> None:
    """ONNX BatchNormalization with running statistics."""
    del momentum, cudnn
    if training or mean is None or variance is None:
        raise lower.refuse(node, "batch_norm in training mode cannot be exported", "trace the model in eval mode")
    channels, dtype = lower.shape(x)[1:2], lower.dtype(node)
    scale = lower.tensor(weight) if weight is not None else _ones(lower, channels, dtype)
    shift = lower.tensor(bias) if bias is not None else _filled(lower, channels, 0, dtype)
    statistics = [lower.tensor(mean), lower.tensor(variance)]
    lower.set(
        node,
        lower.graph.call("BatchNormalization", lower.tensor(x), scale, shift, *statistics, epsilon=float(eps)),
    )


def _over_rows(lower: Lowering, node: fx.Node, x: fx.Node, dims: int, emit: Callable[[ir.Value], ir.Value]) -> None:
    """Normalise ``[rows, width]`` where the input exists so, else the input in its own shape."""
    rows, elements = rows_of(lower.shape(x)), lower.elements(x)
    if dims == 1 and rows is not None and elements.has(rows):
        lower.set(node, emit(elements.get(rows)), rows)
        return
    lower.set(node, emit(lower.tensor(x)))


def _ones(lower: Lowering, shape: Sizes, dtype: torch.dtype) -> ir.Value:
    return _filled(lower, shape, 1, dtype)


def _filled(lower: Lowering, shape: Sizes, number: int, dtype: torch.dtype) -> ir.Value:
    numbers = [size for size in shape if isinstance(size, int)]
    if len(numbers) == len(shape):
        return lower.graph.constant(torch.full(numbers, number, dtype=dtype), dtype)
    return lower.graph.call("Expand", lower.graph.constant(number, dtype), lower.sizes.vector(shape))
