"""Operators that make tensors from nothing: ranges and constants."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from graphwright.backends.onnx.lowering import Lowering
from graphwright.backends.onnx.sizes import Sizes


def _range(lower: Lowering, node: fx.Node, start: Any, end: Any, step: Any) -> None:
    dtype = lower.dtype(node)
    # The runtime ranges over these; any other dtype is cast afterwards.
    kind = dtype if dtype in (torch.int64, torch.int32, torch.float32, torch.float64) else torch.float32
    key = ("range", start, end, step, kind)

    def make() -> ir.Value:
        scope, lower.graph.scope = lower.graph.scope, "sizes"
        first, last, stride = (lower.operand(value, kind) for value in (start, end, step))
        made = lower.graph.call("Range", first, last, stride)
        lower.graph.scope = scope
        return made

    lower.set(node, lower.cast(lower.once(key, make), kind, dtype))


def arange(lower: Lowering, node: fx.Node, *arguments: Any) -> None:
    """ONNX Range: ``(end)``, ``(start, end)`` or ``(start, end, step)``, then dtype, layout, device, pinning."""
    numbers = list(arguments[:-4])
    start, end, step = {1: [0, *numbers, 1], 2: [*numbers, 1], 3: numbers}[len(numbers)]
    _range(lower, node, start, end, step)


def _fill(lower: Lowering, node: fx.Node, value: Any) -> None:
    """A tensor of one value, made when it is read."""
    shape, dtype = lower.shape(node), lower.dtype(node)

    def make() -> tuple[Sizes, ir.Value]:
        scalar = lower.operand(value, dtype)
        return shape, lower.graph.call("Expand", scalar, lower.sizes.vector(shape)) if shape else scalar

    lower.set_elements(node, lower.deferred(make))


def full(lower: Lowering, node: fx.Node, size: Any, value: Any, *arguments: Any) -> None:
    """A tensor of one value."""
    del size, arguments
    _fill(lower, node, value)


def full_like(lower: Lowering, node: fx.Node, x: Any, value: Any, *arguments: Any) -> None:
    """A tensor of one value in the shape of another."""
    del x, arguments
    _fill(lower, node, value)


def new_full(lower: Lowering, node: fx.Node, x: Any, size: Any, value: Any, *arguments: Any) -> None:
    """A tensor of one value."""
    del x, size, arguments
    _fill(lower, node, value)


def scalar_tensor(lower: Lowering, node: fx.Node, value: Any, *arguments: Any) -> None:
    """A scalar."""
    del arguments
    _fill(lower, node, value)


def zeros(lower: Lowering, node: fx.Node, *arguments: Any) -> None:
    """Zeros; also for ``empty``, whose content is unspecified."""
    del arguments
    _fill(lower, node, 0)


def ones(lower: Lowering, node: fx.Node, *arguments: Any) -> None:
    """Ones."""
    del arguments
    _fill(lower, node, 1)
