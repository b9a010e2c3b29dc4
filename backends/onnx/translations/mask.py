"""What an attention may attend, as the mask operand of ONNX operators; equal masks are made once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from graphwright.backends.onnx.lowering import Lowering
from graphwright.backends.onnx.sizes import Sizes


@dataclass(frozen=True)
class Mask:
    """The four ways to restrict attention in the dialect.

    Attributes:
        key_mask: bool ``[B or 1, T]``, or ``None``.
        bias: float added to the scores, or bool where True may be attended; broadcastable to ``[B, H, S, T]``.
        causal: only keys up to the query's position, counted from the last.
        window: only so many keys back, 0 without a limit.
    """

    key_mask: fx.Node | None
    bias: fx.Node | None
    causal: bool
    window: int

    @property
    def may_be_empty(self) -> bool:
        """Whether a query may have nothing to attend."""
        return self.key_mask is not None or self.bias is not None


def for_operator(
    lower: Lowering, node: fx.Node, wanted: Mask, query: fx.Node, key: fx.Node
) -> tuple[bool, ir.Value | None]:
    """The ``is_causal`` attribute and the mask operand of ONNX Attention.

    The operator aligns its causal mask to the first key, which is the dialect's when there are as many keys as queries;
    otherwise the mask says it all. onnxruntime does not broadcast the mask over queries, so that it is expanded.
    """
    del node
    lengths = (lower.shape(query)[2], lower.shape(key)[2])
    aligned = lengths[0] == lengths[1]
    causal = wanted.causal and aligned
    rest = Mask(wanted.key_mask, wanted.bias, wanted.causal and not aligned, wanted.window)

    def make() -> ir.Value | None:
        allowed, bias = parts(lower, rest, query, key)
        dtype = lower.dtype(query)
        if bias is not None:
            bias = _above_lowest(lower, bias, dtype)
        if bias is not None and allowed is not None:
            bias = lower.graph.call("Where", allowed, bias, lower.graph.constant(-math.inf, dtype))
        made = allowed if bias is None else bias
        return None if made is None else _expanded(lower, made, _shape(lower, rest, query, key), lengths)

    return causal, _shared(lower, ("mask operand", rest, lengths, lower.dtype(query)), make)


def parts(lower: Lowering, wanted: Mask, query: fx.Node, key: fx.Node) -> tuple[ir.Value | None, ir.Value | None]:
    """The boolean and the additive part of a mask, each broadcastable to ``[B, H, S, T]``."""
    lengths = (lower.shape(query)[2], lower.shape(key)[2])
    allowed: list[ir.Value] = []
    if wanted.key_mask is not None:
        key_mask = wanted.key_mask
        batch, count = lower.shape(key_mask)

        def padding() -> ir.Value:
            value = lower.elements(key_mask).get((batch, 1, 1, count))
            return lower.cast(value, lower.dtype(key_mask), torch.bool)

        allowed.append(_shared(lower, ("key mask", key_mask), padding))
    if wanted.causal or wanted.window:
        band = ("band", wanted.causal, wanted.window, lengths)
        allowed.append(_shared(lower, band, lambda: _band(lower, wanted, lengths)))
    bias: ir.Value | None = None
    if wanted.bias is not None and lower.dtype(wanted.bias) == torch.bool:
        allowed.append(lower.tensor(wanted.bias))
    elif wanted.bias is not None:
        bias = lower.tensor(wanted.bias, lower.dtype(query))
    if not allowed:
        return None, bias
    result = allowed[0]
    for each in allowed[1:]:
        result = lower.graph.call("And", result, each)
    return result, bias


def _shared(lower: Lowering, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
    scope, lower.graph.scope = lower.graph.scope, "mask"
    value = lower.once(key, make)
    lower.graph.scope = scope
    return value


def _band(lower: Lowering, wanted: Mask, lengths: Sizes) -> ir.Value:
    """bool ``[S, T]``: the keys each query may see by position."""
    graph = lower.graph
    queries, keys = lengths
    zero, one = graph.constant(0, torch.int64), graph.constant(1, torch.int64)
    position = graph.call("Range", zero, lower.sizes.scalar(keys), one)
    offset = keys - queries
    last = graph.call("Range", zero, lower.sizes.scalar(queries), one)
    last = graph.call("Unsqueeze", last, graph.integers(1))
    if offset != 0:
        last = graph.call("Add", last, lower.sizes.value(offset))
    result: ir.Value | None = None
    if wanted.causal:
        result = graph.call("LessOrEqual", position, last)
    if wanted.window:
        first = graph.call("Sub", last, graph.constant(wanted.window, torch.int64))
        inside = graph.call("Greater", position, first)
        result = inside if result is None else graph.call("And", result, inside)
    assert result is not None
    return result


def _above_lowest(lower: Lowering, bias: ir.Value, dtype: torch.dtype) -> ir.Value:
    """Finite biases kept off the lowest number of the dtype, which models mask with.

    Where that is all a query sees, it attends to everything alike; onnxruntime takes it for "nothing to attend".
    """
    limit = lower.graph.constant(torch.finfo(dtype).min / 4, dtype)
    raised = lower.graph.call("Max", bias, limit)
    return lower.graph.call("Where", lower.graph.call("IsInf", bias), bias, raised)


def _shape(lower: Lowering, wanted: Mask, query: fx.Node, key: fx.Node) -> Sizes:
    """The broadcast shape of a mask's parts, padded to four dimensions."""
    lengths = (lower.shape(query)[2], lower.shape(key)[2])
    shapes: list[Sizes] = []
    if wanted.key_mask is not None:
        batch, count = lower.shape(wanted.key_mask)
        shapes.append((batch, 1, 1, count))
    if wanted.causal or wanted.window:
        shapes.append((1, 1, *lengths))
    if wanted.bias is not None:
        bias = lower.shape(wanted.bias)
        shapes.append((1,) * (4 - len(bias)) + bias)
    return tuple(next((size for size in sizes if size != 1), 1) for sizes in zip(*shapes, strict=True))


def _expanded(lower: Lowering, value: ir.Value, shape: Sizes, lengths: Sizes) -> ir.Value:
    """The mask with every query and key written out, and at least two dimensions."""
    if shape[2:] == lengths:
        return value
    return lower.graph.call("Expand", value, lower.sizes.vector((*shape[:2], *lengths)))
