"""Heads side by side in the last dimension, as attention kernels take and give them."""

from __future__ import annotations

import onnx_ir as ir
from torch import fx

from graphwright.backends.onnx.elements import Elements
from graphwright.backends.onnx.lowering import Lowering
from graphwright.backends.onnx.sizes import Sizes


def joined_shape(shape: Sizes) -> Sizes:
    """``[B, H, S, D]`` with the heads side by side: ``[B, S, H*D]``."""
    batch, heads, length, width = shape
    total = heads * width
    return (batch, length, total)


def joined(lower: Lowering, x: fx.Node) -> ir.Value:
    """A value of shape ``[B, H, S, D]`` as ``[B, S, H*D]``."""
    shape = lower.shape(x)
    batch, heads, length, width = shape
    elements = lower.elements(x).swapped
    if elements is None:
        value = lower.graph.call("Transpose", lower.tensor(x), perm=[0, 2, 1, 3])
        elements = Elements.of(lower.graph, lower.sizes, (batch, length, heads, width), value)
    return elements.get(joined_shape(shape))


def set_from_joined(lower: Lowering, node: fx.Node, shape: Sizes, value: ir.Value) -> None:
    """Set a result of shape ``[B, H, S, D]`` that was computed as ``[B, S, H*D]``, which is ``shape``."""
    own = lower.shape(node)
    batch, heads, length, width = own
    elements = Elements.of(lower.graph, lower.sizes, shape, value)

    def make() -> tuple[Sizes, ir.Value]:
        apart = elements.get((batch, length, heads, width))
        return own, lower.graph.call("Transpose", apart, perm=[0, 2, 1, 3])

    lower.set_elements(node, lower.deferred(make, swapped=elements))
