"""Mistakes in the attention of a sentence embedder (all-MiniLM-L6-v2)."""

from __future__ import annotations

import torch
from tests.passes.planted.catalogue import find, put, right, stored, weight_of, wrong

import graphwright as gw


@wrong("minilm")
def query_and_key_swapped(program: gw.Program, rewriter: gw.Rewriter) -> None:
    attention = find(program, "aten.scaled_dot_product_attention", 1)
    query, key, *rest = attention.args
    put(rewriter, attention, attention.target, key, query, *rest, **attention.kwargs)


@wrong("minilm")
def key_and_value_swapped(program: gw.Program, rewriter: gw.Rewriter) -> None:
    attention = find(program, "aten.scaled_dot_product_attention", 1)
    query, key, value, *rest = attention.args
    put(rewriter, attention, attention.target, query, value, key, *rest, **attention.kwargs)


@wrong("minilm")
def padding_mask_lost(program: gw.Program, rewriter: gw.Rewriter) -> None:
    attention = find(program, "aten.scaled_dot_product_attention", 2)
    put(rewriter, attention, attention.target, *attention.args[:3], **attention.kwargs)


@wrong("minilm")
def padding_mask_inverted(program: gw.Program, rewriter: gw.Rewriter) -> None:
    attention = find(program, "aten.scaled_dot_product_attention", 2)
    inverted = rewriter.call("aten.logical_not", attention.args[3], like=attention)
    put(rewriter, attention, attention.target, *attention.args[:3], inverted, **attention.kwargs)


@wrong("minilm")
def padding_mask_on_queries(program: gw.Program, rewriter: gw.Rewriter) -> None:
    """Rows are masked instead of columns: the mask is transposed."""
    attention = find(program, "aten.scaled_dot_product_attention", 2)
    turned = rewriter.call("aten.transpose.int", attention.args[3], -1, -2, like=attention)
    put(rewriter, attention, attention.target, *attention.args[:3], turned, **attention.kwargs)


@wrong("minilm")
def causal_where_it_is_not(program: gw.Program, rewriter: gw.Rewriter) -> None:
    attention = find(program, "aten.scaled_dot_product_attention", 2)
    causal = rewriter.call("aten.tril", attention.args[3], like=attention)
    put(rewriter, attention, attention.target, *attention.args[:3], causal, **attention.kwargs)


@wrong("minilm")
def attention_scale_by_the_model_width(program: gw.Program, rewriter: gw.Rewriter) -> None:
    attention = find(program, "aten.scaled_dot_product_attention", 2)
    kwargs = {**attention.kwargs, "scale": 384**-0.5}
    put(rewriter, attention, attention.target, *attention.args, **kwargs)


@wrong("minilm")
def attention_scale_twice(program: gw.Program, rewriter: gw.Rewriter) -> None:
    attention = find(program, "aten.scaled_dot_product_attention", 2)
    scaled = rewriter.call("aten.mul.Tensor", attention.args[0], 32**-0.5, like=attention)
    put(rewriter, attention, attention.target, scaled, *attention.args[1:], **attention.kwargs)


@wrong("minilm")
def heads_split_by_reshape(program: gw.Program, rewriter: gw.Rewriter) -> None:
    """``view`` to the shape that ``transpose`` would have given."""
    transpose = find(program, "aten.transpose.int", 0)
    view = transpose.args[0]
    batch, sequence = view.args[1][:2]
    put(rewriter, transpose, "aten.reshape", view, [batch, 12, sequence, 32])


@wrong("minilm")
def heads_merged_without_transpose(program: gw.Program, rewriter: gw.Rewriter) -> None:
    attention = find(program, "aten.scaled_dot_product_attention", 0)
    merged = find(program, "aten.reshape", -1, "layer.0.attention")
    put(rewriter, merged, "aten.reshape", attention, merged.args[1])


@wrong("minilm")
def qkv_fused_with_key_and_value_swapped(program: gw.Program, rewriter: gw.Rewriter) -> None:
    _fuse_qkv(program, rewriter, order=(0, 2, 1))


@wrong("minilm")
def qkv_fused_with_biases_in_another_order(program: gw.Program, rewriter: gw.Rewriter) -> None:
    _fuse_qkv(program, rewriter, bias_order=(1, 0, 2))


@wrong("minilm")
def qkv_split_along_the_wrong_axis_of_heads(program: gw.Program, rewriter: gw.Rewriter) -> None:
    """Interleaved by head, as GPT-NeoX stores it, but split in thirds."""
    _fuse_qkv(program, rewriter, interleave=True)


@right("minilm")
def qkv_fused(program: gw.Program, rewriter: gw.Rewriter) -> None:
    _fuse_qkv(program, rewriter)


def _fuse_qkv(
    program: gw.Program,
    rewriter: gw.Rewriter,
    *,
    order: tuple[int, ...] = (0, 1, 2),
    bias_order: tuple[int, ...] = (0, 1, 2),
    interleave: bool = False,
) -> None:
    linears = [find(program, "aten.linear", index) for index in range(3)]
    weights = [weight_of(program, linears[index]) for index in order]
    biases = [program.tensor(linears[index].args[2]).detach() for index in bias_order]
    weight, bias = torch.cat(weights), torch.cat(biases)
    if interleave:
        weight = weight.reshape(3, 12, 32, -1).transpose(0, 1).reshape(weight.shape)
    fused = rewriter.call(
        "aten.linear",
        linears[0].args[0],
        stored(rewriter, linears[0], weight, "qkv_weight"),
        stored(rewriter, linears[0], bias, "qkv_bias"),
        like=linears[0],
    )
    parts = rewriter.call("aten.split.Tensor", fused, 384, -1, like=linears[0])
    for index, linear in enumerate(linears):
        put(rewriter, linear, "py.getitem", parts, index)
