"""Operators of a decoding step: attention over the cache is one ``GroupQueryAttention``, which also appends to it."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from graphwright.backends.onnx.decoder import DecoderLowering
from graphwright.backends.onnx.graph import CONTRIB
from graphwright.backends.onnx.kernels import ATTENTION
from graphwright.backends.onnx.lowering import Lowering
from graphwright.backends.onnx.packing import find_packed
from graphwright.backends.onnx.rotation import find_rotation
from graphwright.backends.onnx.translations.heads import joined, joined_shape, set_from_joined
from graphwright.backends.onnx.translations.linear import put_together
from graphwright.ir.names import op_name

# What its CPU kernel asks of the head dim.
_WIDTH_STEP = 8


def cache_append(lower: Lowering, node: fx.Node, cache: fx.Node, new: fx.Node, slots: fx.Node, starts: fx.Node) -> None:
    """Nothing by itself: the attention appends."""
    _decoder(lower, node).append(node, cache, new, slots, starts)


def cached_attention(
    lower: Lowering,
    node: fx.Node,
    query: fx.Node,
    keys: fx.Node,
    values: fx.Node,
    slots: fx.Node,
    starts: fx.Node,
    slopes: fx.Node | None,
    scale: float,
    window: int,
    softcap: float,
) -> None:
    """``GroupQueryAttention``, with rotary embedding where queries and keys are rotated by stored angles.

    Queries, keys and values that one linear gives stay in one piece.

    Raises:
        ExportError: values are of another head dim than keys, or the head dim has no kernel.
    """
    decoder = _decoder(lower, node)
    key, value = (decoder.appended(node, each, slots, starts) for each in (keys, values))
    heads, width = lower.shape(query)[1], lower.shape(query)[3]
    if lower.shape(value.new)[3] != width:
        raise lower.refuse(node, f"{ATTENTION} takes values of the keys' head dim only")
    if not isinstance(width, int) or width % _WIDTH_STEP:
        raise lower.refuse(node, f"{ATTENTION} has no kernel for a head dim of {width}, only for multiples of 8")
    rotation = find_rotation(decoder, query, key.new)
    attributes: dict[str, Any] = {
        "num_heads": heads,
        "kv_num_heads": lower.shape(key.new)[1],
        "scale": float(scale),
        "local_window_size": window if window > 0 else None,
        "softcap": softcap if softcap > 0 else None,
    }
    tables: tuple[ir.Value | None, ir.Value | None] = (None, None)
    new = [query, key.new, value.new]
    if rotation is not None:
        new[:2] = rotation.query, rotation.key
        tables = rotation.cos, rotation.sin
        attributes |= {"do_rotary": 1, "rotary_interleaved": 1 if rotation.interleaved else None}
    result, *presents = lower.graph.call_many(
        ATTENTION,
        *_side_by_side(lower, *new),
        decoder.past(key),
        decoder.past(value),
        decoder.last_lengths,
        decoder.total_length,
        *tables,
        None,
        _linear_bias(decoder, slopes, starts, query) if slopes is not None else None,
        domain=CONTRIB,
        count=3,
        **attributes,
    )
    for cache, present in zip((keys, values), presents, strict=True):
        decoder.set_present(cache, present)
    set_from_joined(lower, node, joined_shape(lower.shape(node)), result)


def _side_by_side(
    lower: Lowering, query: fx.Node, key: fx.Node, value: fx.Node
) -> tuple[ir.Value, ir.Value | None, ir.Value | None]:
    """Queries, keys and values as the kernel takes them; what one linear gives for all three stays in one piece."""
    packed = find_packed(lower, query, key, value)
    if packed is None:
        return joined(lower, query), joined(lower, key), joined(lower, value)
    if op_name(packed) == "aten.linear":
        put_together(lower, packed)
    return lower.tensor(packed), None, None


def select_rows(lower: Lowering, node: fx.Node, x: fx.Node, rows: fx.Node) -> None:
    """The tokens that the export was asked for."""
    decoder = _decoder(lower, node)
    if rows is not lower.program.inputs[3]:
        raise lower.refuse(node, "selects rows other than the step's")
    if decoder.selected is None:
        lower.set_elements(node, lower.elements(x))
        return
    indices = lower.graph.call("Unsqueeze", decoder.selected, lower.graph.integers(2))
    lower.set(node, lower.graph.call("GatherND", lower.tensor(x), indices, batch_dims=1))


def _linear_bias(decoder: DecoderLowering, slopes: fx.Node, starts: fx.Node, query: fx.Node) -> ir.Value:
    """ALiBi: slope times distance, ``[batch, heads, sequence, total sequence]``."""
    graph, dtype = decoder.graph, decoder.dtype(query)

    def distances() -> ir.Value:
        scope, graph.scope = graph.scope, "distances"
        zero, one = (graph.constant(number, torch.int64) for number in (0, 1))
        length = decoder.sizes.scalar(decoder.shape(query)[2])
        total = decoder.cast(decoder.total_length, torch.int32, torch.int64)
        first = graph.call("Unsqueeze", decoder.tensor(starts), graph.integers(1, 2, 3))
        own = graph.call("Unsqueeze", graph.call("Range", zero, length, one), graph.integers(1))
        distance = graph.call("Sub", graph.call("Range", zero, total, one), graph.call("Add", first, own))
        value = decoder.cast(distance, torch.int64, dtype)
        graph.scope = scope
        return value

    distance = decoder.once(("distances", dtype), distances)
    shape = (decoder.shape(slopes)[0], 1, 1)
    factors = decoder.cast(decoder.elements(slopes).get(shape), decoder.dtype(slopes), dtype)
    made: ir.Value = decoder.once(("linear bias", factors), lambda: graph.call("Mul", factors, distance))
    return made


def _decoder(lower: Lowering, node: fx.Node) -> DecoderLowering:
    if not isinstance(lower, DecoderLowering):
        raise lower.refuse(
            node,
            "works on a cache, but the program is not a decoding step",
            "its inputs are input_ids, slots, starts, rows and the caches; trace it with load_decoder",
        )
    if not lower.options.has_contrib:
        raise lower.refuse(node, "a decoder is exported with onnxruntime's operators", "use mode='runtime'")
    return lower
