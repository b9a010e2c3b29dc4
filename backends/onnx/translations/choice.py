"""Operators that choose between values: where, masks, clamping, triangles."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphwright.backends.onnx.lowering import Lowering
from graphwright.backends.onnx.translations.pointwise import pointwise


def where(lower: Lowering, node: fx.Node, condition: fx.Node, a: Any, b: Any) -> None:
    """ONNX Where."""
    dtype = lower.dtype(node)
    pointwise(
        lower,
        node,
        [(condition, torch.bool), (a, dtype), (b, dtype)],
        lambda test, left, right: lower.graph.call("Where", test, left, right),
    )


def masked_fill(lower: Lowering, node: fx.Node, x: fx.Node, mask: fx.Node, value: Any) -> None:
    """``where(mask, value, x)``."""
    where(lower, node, mask, value, x)


def apply_mask(lower: Lowering, node: fx.Node, weight: fx.Node, mask: fx.Node) -> None:
    """``where(mask, weight, 0)``."""
    where(lower, node, mask, weight, 0)


def clamp(lower: Lowering, node: fx.Node, x: fx.Node, low: Any = None, high: Any = None) -> None:
    """Bounds applied one after the other, the upper one last, as torch does."""
    dtype = lower.dtype(node)
    bounds = [("Max", low), ("Min", high)]
    given = [(op, bound) for op, bound in bounds if bound is not None]

    def emit(value: Any, *limits: Any) -> Any:
        for (op, _), limit in zip(given, limits, strict=True):
            value = lower.graph.call(op, value, limit)
        return value

    pointwise(lower, node, [(x, dtype), *[(bound, dtype) for _, bound in given]], emit)


def clamp_min(lower: Lowering, node: fx.Node, x: fx.Node, low: Any) -> None:
    """A lower bound."""
    clamp(lower, node, x, low, None)


def clamp_max(lower: Lowering, node: fx.Node, x: fx.Node, high: Any) -> None:
    """An upper bound."""
    clamp(lower, node, x, None, high)


def _triangle(lower: Lowering, node: fx.Node, x: fx.Node, diagonal: int, upper: int) -> None:
    offset = lower.operand(diagonal, torch.int64)
    dtype = lower.dtype(x)
    if dtype == torch.bool:
        # The runtime has no boolean kernel.
        result = lower.graph.call("Trilu", lower.tensor(x, torch.int64), offset, upper=upper)
        lower.set(node, lower.cast(result, torch.int64, torch.bool))
        return
    lower.set(node, lower.graph.call("Trilu", lower.tensor(x), offset, upper=upper))


def tril(lower: Lowering, node: fx.Node, x: fx.Node, diagonal: int) -> None:
    """Lower triangle."""
    _triangle(lower, node, x, diagonal, 0)


def triu(lower: Lowering, node: fx.Node, x: fx.Node, diagonal: int) -> None:
    """Upper triangle."""
    _triangle(lower, node, x, diagonal, 1)
