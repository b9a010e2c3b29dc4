"""Rotary position embedding."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from torch import fx

from graphwright.backends.onnx.lowering import Lowering
from graphwright.backends.onnx.sizes import Size, Sizes
from graphwright.backends.onnx.translations.heads import joined_shape, set_from_joined


def rotary_embedding(lower: Lowering, node: fx.Node, x: fx.Node, cos: fx.Node, sin: fx.Node, interleaved: bool) -> None:
    """RotaryEmbedding from opset 23 on, else written out.

    The ONNX operator takes one angle per pair, ``[B, S, R/2]``, where the dialect repeats it for both members; heads
    may lie side by side in the last dimension, as attention takes them.
    """
    batch, heads, length, width = lower.shape(x)
    rotated = lower.shape(cos)[-1]
    if not isinstance(heads, int) or not isinstance(width, int) or not isinstance(rotated, int):
        raise lower.refuse(node, "heads or head size vary from call to call")
    if not lower.options.has_attention:
        lower.set(node, _written_out(lower, x, cos, sin, interleaved, rotated, width))
        return
    angles = [_half(lower, each, (batch, length, rotated), interleaved) for each in (cos, sin)]
    attributes: dict[str, Any] = {
        "interleaved": int(interleaved),
        "rotary_embedding_dim": rotated if rotated != width else None,
    }
    swapped = lower.elements(x).swapped
    if swapped is None:
        lower.set(node, lower.graph.call("RotaryEmbedding", lower.tensor(x), *angles, **attributes))
        return
    joined = joined_shape(lower.shape(x))
    value = lower.graph.call("RotaryEmbedding", swapped.get(joined), *angles, num_heads=heads, **attributes)
    set_from_joined(lower, node, joined, value)


def _half(lower: Lowering, angles: fx.Node, wanted: Sizes, interleaved: bool) -> ir.Value:
    """One angle per pair, for every row of the batch."""

    def make() -> ir.Value:
        batch, length, width = wanted
        value = lower.tensor(angles)
        assert isinstance(width, int)
        step, end = (2, width) if interleaved else (1, width // 2)
        integers = lower.graph.integers
        value = lower.graph.call("Slice", value, integers(0), integers(end), integers(-1), integers(step))
        if lower.shape(angles)[0] == batch:
            return value
        return lower.graph.call("Expand", value, lower.sizes.vector((batch, length, width // 2)))

    scope, lower.graph.scope = lower.graph.scope, ""
    value: ir.Value = lower.once(("half angles", angles, wanted, interleaved), make)
    lower.graph.scope = scope
    return value


def _written_out(
    lower: Lowering, x: fx.Node, cos: fx.Node, sin: fx.Node, interleaved: bool, rotated: int, width: int
) -> ir.Value:
    graph, integers = lower.graph, lower.graph.integers
    last = integers(-1)
    value, rest = lower.tensor(x), None
    if rotated != width:
        value, rest = graph.call_many("Split", value, integers(rotated, width - rotated), count=2, axis=-1)
    if interleaved:
        even = graph.call("Slice", value, integers(0), integers(rotated), last, integers(2))
        odd = graph.call("Slice", value, integers(1), integers(rotated), last, integers(2))
        pairs = [graph.call("Unsqueeze", each, last) for each in (graph.call("Neg", odd), even)]
        shape: list[Size] = [*lower.shape(x)[:-1], rotated]
        turned = graph.call("Reshape", graph.call("Concat", *pairs, axis=-1), lower.sizes.vector(tuple(shape)))
    else:
        low, high = graph.call_many("Split", value, integers(rotated // 2, rotated // 2), count=2, axis=-1)
        turned = graph.call("Concat", graph.call("Neg", high), low, axis=-1)
    heads = integers(1)
    angles = [graph.call("Unsqueeze", lower.tensor(each, lower.dtype(x)), heads) for each in (cos, sin)]
    result = graph.call("Add", graph.call("Mul", value, angles[0]), graph.call("Mul", turned, angles[1]))
    return result if rest is None else graph.call("Concat", result, rest, axis=-1)
