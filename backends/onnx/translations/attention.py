"""Scaled dot-product attention: one ONNX Attention, or written out."""

from __future__ import annotations

import math
from dataclasses import dataclass

import onnx_ir as ir
from torch import fx

from graphwright.backends.onnx.lowering import Lowering
from graphwright.backends.onnx.translations import mask
from graphwright.backends.onnx.translations.heads import joined_shape, set_from_joined


@dataclass(frozen=True)
class _Call:
    """One attention: operands ``[B, H, S, D]``, what may be attended, and the factor on the scores."""

    query: fx.Node
    key: fx.Node
    value: fx.Node
    mask: mask.Mask
    scale: float


def attention(
    lower: Lowering,
    node: fx.Node,
    query: fx.Node,
    key: fx.Node,
    value: fx.Node,
    key_mask: fx.Node | None,
    bias: fx.Node | None,
    scale: float,
    causal: bool,
    window: int,
) -> None:
    """The dialect's attention."""
    _attend(lower, node, _Call(query, key, value, mask.Mask(key_mask, bias, causal, window), scale))


def scaled_dot_product_attention(
    lower: Lowering,
    node: fx.Node,
    query: fx.Node,
    key: fx.Node,
    value: fx.Node,
    attn_mask: fx.Node | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> None:
    """``aten.scaled_dot_product_attention``; its causal mask is aligned to the first key, not to the last."""
    del enable_gqa
    if dropout_p > 0:
        raise lower.refuse(node, "attention with dropout cannot be exported", "trace the model in eval mode")
    if len(lower.shape(query)) != 4:
        raise lower.refuse(node, f"attention on {len(lower.shape(query))} dimensions is not exported")
    if is_causal and lower.shape(query)[2] != lower.shape(key)[2]:
        raise lower.refuse(node, "causal attention with more keys than queries is exported as the dialect's attention")
    width = lower.shape(query)[-1]
    if not isinstance(width, int):
        raise lower.refuse(node, "the head size varies from call to call")
    factor = 1 / math.sqrt(width) if scale is None else scale
    _attend(lower, node, _Call(query, key, value, mask.Mask(None, attn_mask, is_causal, 0), factor))


def _attend(lower: Lowering, node: fx.Node, call: _Call) -> None:
    if not lower.options.has_attention:
        lower.set(node, _written_out(lower, call))
        return
    operands = [call.query, call.key, call.value]
    causal, allowed = mask.for_operator(lower, node, call.mask, call.query, call.key)
    heads = [lower.shape(each)[1] for each in operands]
    sources = [lower.elements(each).swapped for each in operands]
    if all(source is not None for source in sources) and all(isinstance(count, int) for count in heads):
        values = [
            source.get(joined_shape(lower.shape(each)))
            for source, each in zip(sources, operands, strict=True)
            if source is not None
        ]
        result = lower.graph.call(
            "Attention",
            *values,
            allowed,
            q_num_heads=heads[0],
            kv_num_heads=heads[1],
            scale=call.scale,
            is_causal=int(causal),
        )
        set_from_joined(lower, node, joined_shape(lower.shape(node)), result)
        return
    values = [lower.tensor(each) for each in operands]
    lower.set(node, lower.graph.call("Attention", *values, allowed, scale=call.scale, is_causal=int(causal)))


def _written_out(lower: Lowering, call: _Call) -> ir.Value:
    graph, dtype = lower.graph, lower.dtype(call.query)
    key, value = (_spread_heads(lower, each, call.query) for each in (call.key, call.value))
    query = graph.call("Mul", lower.tensor(call.query), graph.constant(call.scale, dtype))
    scores = graph.call("MatMul", query, graph.call("Transpose", key, perm=[0, 1, 3, 2]))
    allowed, bias = mask.parts(lower, call.mask, call.query, call.key)
    if bias is not None:
        scores = graph.call("Add", scores, bias)
    if allowed is not None:
        scores = graph.call("Where", allowed, scores, graph.constant(-math.inf, dtype))
    weights = graph.call("Softmax", scores, axis=-1)
    if call.mask.may_be_empty:
        # A query with nothing to attend has no softmax; it yields zeros.
        weights = graph.call("Where", graph.call("IsNaN", weights), graph.constant(0, dtype), weights)
    return graph.call("MatMul", weights, value)


def _spread_heads(lower: Lowering, x: fx.Node, query: fx.Node) -> ir.Value:
    """Keys or values with every head repeated for the queries that share it."""
    batch, heads, length, width = lower.shape(x)
    wanted = lower.shape(query)[1]
    if heads == wanted:
        return lower.tensor(x)
    groups = wanted // heads
    opened = lower.elements(x).get((batch, heads, 1, length, width))
    widened = lower.graph.call("Expand", opened, lower.sizes.vector((batch, heads, groups, length, width)))
    return lower.graph.call("Reshape", widened, lower.sizes.vector((batch, wanted, length, width)))
