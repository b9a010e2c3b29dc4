"""Mistakes in a small Llama with grouped queries, its attention spelled out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.passes.planted.catalogue import again, find, put, right, stored, wrong
from torch import fx

import graphwright as gw


@wrong("llama")
def softmax_over_queries(program: gw.Program, rewriter: gw.Rewriter) -> None:
    softmax = find(program, "aten.softmax.int", 0)
    put(rewriter, softmax, "aten.softmax.int", softmax.args[0], -2, *softmax.args[2:])


@wrong("llama")
def softmax_over_heads(program: gw.Program, rewriter: gw.Rewriter) -> None:
    softmax = find(program, "aten.softmax.int", 0)
    put(rewriter, softmax, "aten.softmax.int", softmax.args[0], 1, *softmax.args[2:])


@wrong("llama")
def softmax_without_the_sum(program: gw.Program, rewriter: gw.Rewriter) -> None:
    softmax = find(program, "aten.softmax.int", 0)
    put(rewriter, softmax, "aten.sigmoid", softmax.args[0])


@right("llama")
def softmax_spelled_out(program: gw.Program, rewriter: gw.Rewriter) -> None:
    softmax = find(program, "aten.softmax.int", 0)
    x = softmax.args[0]
    largest = rewriter.call("aten.amax", x, [-1], True, like=softmax)
    powers = rewriter.call("aten.exp", rewriter.call("aten.sub.Tensor", x, largest, like=softmax), like=softmax)
    total = rewriter.call("aten.sum.dim_IntList", powers, [-1], True, like=softmax)
    put(rewriter, softmax, "aten.div.Tensor", powers, total)


@wrong("llama")
def causal_mask_lost(program: gw.Program, rewriter: gw.Rewriter) -> None:
    le = find(program, "aten.le.Tensor", 0)
    put(rewriter, le, "aten.ones_like", again(rewriter, le))


@wrong("llama")
def causal_mask_off_by_one(program: gw.Program, rewriter: gw.Rewriter) -> None:
    """A token no longer sees itself."""
    le = find(program, "aten.le.Tensor", 0)
    put(rewriter, le, "aten.lt.Tensor", *le.args)


@wrong("llama")
def causal_mask_mirrored(program: gw.Program, rewriter: gw.Rewriter) -> None:
    le = find(program, "aten.le.Tensor", 0)
    put(rewriter, le, "aten.ge.Tensor", *le.args)


@wrong("llama")
def whole_mask_lost(program: gw.Program, rewriter: gw.Rewriter) -> None:
    add = find(program, "aten.add.Tensor", 0, "self_attn")
    candidates = [node for node in program.nodes if gw.op_name(node) == "aten.softmax.int"]
    add = candidates[1].args[0]
    rewriter.replace(add, add.args[0])


@wrong("llama")
def scores_of_key_times_query(program: gw.Program, rewriter: gw.Rewriter) -> None:
    """The operands of the product swapped: the scores are transposed."""
    scores = find(program, "aten.matmul", 0)
    query, turned = scores.args
    key = turned.args[0]
    put(rewriter, scores, "aten.matmul", key, rewriter.call("aten.transpose.int", query, 2, 3, like=scores))


@wrong("llama")
def heads_grouped_round_robin(program: gw.Program, rewriter: gw.Rewriter) -> None:
    """Key heads repeated as 0 1 0 1 instead of 0 0 1 1."""
    reshape = find(program, "aten.reshape", 0, "self_attn")
    key = reshape.args[0].args[0].args[0].args[0].args[0]
    put(rewriter, reshape, "aten.repeat", key, [1, 2, 1, 1])


@right("llama")
def heads_repeated_interleaved(program: gw.Program, rewriter: gw.Rewriter) -> None:
    reshape = find(program, "aten.reshape", 0, "self_attn")
    key = reshape.args[0].args[0].args[0].args[0].args[0]
    put(rewriter, reshape, "aten.repeat_interleave.self_int", key, 2, 1)


def _rope(program: gw.Program, rewriter: gw.Rewriter, number: int, build: Callable[..., fx.Node]) -> None:
    """Replace ``x * cos + rotated * sin`` by ``build(add, x, cos, rotated, sin)``."""
    rotated = find(program, "aten.cat", number, "self_attn")
    (product,) = rotated.users
    (add,) = product.users
    x, cos = add.args[0].args
    rewriter.replace(add, build(add, x, cos, rotated, product.args[1]))


@wrong("llama")
def rope_with_sine_negated(program: gw.Program, rewriter: gw.Rewriter) -> None:
    def build(add: fx.Node, *_: fx.Node) -> fx.Node:
        return rewriter.call("aten.sub.Tensor", *add.args, like=add)

    _rope(program, rewriter, 0, build)


@wrong("llama")
def rope_with_sine_and_cosine_swapped(program: gw.Program, rewriter: gw.Rewriter) -> None:
    def build(add: fx.Node, x: fx.Node, cos: fx.Node, rotated: fx.Node, sin: fx.Node) -> fx.Node:
        left = rewriter.call("aten.mul.Tensor", x, sin, like=add)
        return rewriter.call(
            "aten.add.Tensor", left, rewriter.call("aten.mul.Tensor", rotated, cos, like=add), like=add
        )

    _rope(program, rewriter, 1, build)


@wrong("llama")
def rope_interleaved(program: gw.Program, rewriter: gw.Rewriter) -> None:
    _rope_operator(program, rewriter, interleaved=True)


@right("llama")
def rope_as_operator(program: gw.Program, rewriter: gw.Rewriter) -> None:
    _rope_operator(program, rewriter, interleaved=False)


def _rope_operator(program: gw.Program, rewriter: gw.Rewriter, *, interleaved: bool) -> None:
    def build(add: fx.Node, x: fx.Node, cos: fx.Node, rotated: fx.Node, sin: fx.Node) -> fx.Node:
        tables = [rewriter.call("aten.squeeze.dim", table, 1, like=add) for table in (cos, sin)]
        return rewriter.call("graphwright.rotary_embedding", x, *tables, interleaved, like=add)

    _rope(program, rewriter, 0, build)


@wrong("llama")
def rope_on_queries_only(program: gw.Program, rewriter: gw.Rewriter) -> None:
    _rope(program, rewriter, 1, lambda add, x, *_: x)


@wrong("llama")
def rope_halves_swapped(program: gw.Program, rewriter: gw.Rewriter) -> None:
    rotated = find(program, "aten.cat", 0, "self_attn")
    put(rewriter, rotated, "aten.cat", list(reversed(rotated.args[0])), -1)


@wrong("llama")
def rope_slices_off_by_one(program: gw.Program, rewriter: gw.Rewriter) -> None:
    rotated = find(program, "aten.cat", 0, "self_attn")
    low = rotated.args[0][1]
    x = low.args[0]
    high = rewriter.call("aten.slice.Tensor", x, 3, 3, 7, like=rotated)
    put(rewriter, rotated, "aten.cat", [rewriter.call("aten.neg", high, like=rotated), low], -1)


@wrong("llama")
def rope_cat_along_the_wrong_axis(program: gw.Program, rewriter: gw.Rewriter) -> None:
    """Heads are put together instead of halves, and taken apart as halves again."""
    rotated = find(program, "aten.cat", 0, "self_attn")
    stacked = rewriter.call("aten.cat", rotated.args[0], 1, like=rotated)
    batch = rewriter.call("aten.sym_size.int", stacked, 0, like=rotated)
    length = rewriter.call("aten.sym_size.int", stacked, 2, like=rotated)
    rewriter.replace(rotated, rewriter.call("aten.reshape", stacked, [batch, 4, length, 8], like=rotated))


@wrong("llama")
def rope_frequencies_of_another_base(program: gw.Program, rewriter: gw.Rewriter) -> None:
    node = next(node for node in program.nodes if node.op == "get_attr" and "inv_freq" in str(node.target))
    rewriter.replace(node, stored(rewriter, node, program.tensor(node) ** 1.1, "inv_freq"))


@wrong("llama")
def rms_norm_epsilon_1e_6_as_1e_5(program: gw.Program, rewriter: gw.Rewriter) -> None:
    _rms(program, rewriter, lambda x: ("graphwright.rms_norm", x, None, 1e-5))


@right("llama")
def rms_norm_as_operator(program: gw.Program, rewriter: gw.Rewriter) -> None:
    _rms(program, rewriter, lambda x: ("graphwright.rms_norm", x, None, 1e-6))


@wrong("llama")
def rms_norm_as_layer_norm(program: gw.Program, rewriter: gw.Rewriter) -> None:
    _rms(program, rewriter, lambda x: ("aten.layer_norm", x, [32], None, None, 1e-6))


def _rms(program: gw.Program, rewriter: gw.Rewriter, call: Callable[[fx.Node], tuple[Any, ...]]) -> None:
    scale = find(program, "aten.rsqrt", 1)
    (product,) = scale.users
    target, *operands = call(product.args[0])
    put(rewriter, product, target, *operands)


@wrong("llama")
def mean_over_the_wrong_axis(program: gw.Program, rewriter: gw.Rewriter) -> None:
    """The mean square of a feature over the sequence; broadcasting hides it from every shape."""
    scale = find(program, "aten.rsqrt", 1)
    (product,) = scale.users
    shifted = scale.args[0]
    square = shifted.args[0].args[0]
    mean = rewriter.call("aten.mean.dim", square, [1], True, like=product)
    root = rewriter.call("aten.rsqrt", rewriter.call("aten.add.Tensor", mean, 1e-6, like=product), like=product)
    put(rewriter, product, "aten.mul.Tensor", product.args[0], root)


@wrong("llama")
def rms_norm_epsilon_outside_the_root(program: gw.Program, rewriter: gw.Rewriter) -> None:
    scale = find(program, "aten.rsqrt", 1)
    mean, eps = scale.args[0].args
    root = rewriter.call("aten.add.Tensor", rewriter.call("aten.sqrt", mean, like=scale), eps, like=scale)
    put(rewriter, scale, "aten.reciprocal", root)


@wrong("llama")
def rms_norm_weight_plus_one(program: gw.Program, rewriter: gw.Rewriter) -> None:
    """Gemma's norm for Llama's."""
    product = find(program, "aten.mul.Tensor", -1, "model.norm")
    weight, normed = product.args
    put(rewriter, product, "aten.mul.Tensor", rewriter.call("aten.add.Tensor", weight, 1.0, like=product), normed)


@wrong("llama")
def rms_norm_weight_dropped(program: gw.Program, rewriter: gw.Rewriter) -> None:
    product = find(program, "aten.mul.Tensor", -1, "model.norm")
    rewriter.replace(product, product.args[1])


@wrong("llama")
def gelu_for_silu(program: gw.Program, rewriter: gw.Rewriter) -> None:
    silu = find(program, "aten.silu", 0)
    put(rewriter, silu, "aten.gelu", silu.args[0])


@wrong("llama")
def gate_and_up_swapped(program: gw.Program, rewriter: gw.Rewriter) -> None:
    product = next(iter(find(program, "aten.silu", 0).users))
    silu, up = product.args
    put(rewriter, product, "graphwright.gated_activation", up, silu.args[0], "silu")


@right("llama")
def gate_and_up_as_operator(program: gw.Program, rewriter: gw.Rewriter) -> None:
    product = next(iter(find(program, "aten.silu", 0).users))
    silu, up = product.args
    put(rewriter, product, "graphwright.gated_activation", silu.args[0], up, "silu")


@wrong("llama")
def weights_of_the_wrong_layer(program: gw.Program, rewriter: gw.Rewriter) -> None:
    first, second = find(program, "aten.linear", 6), find(program, "aten.linear", 13)
    put(rewriter, first, "aten.linear", first.args[0], second.args[1])


@wrong("llama")
def logits_shifted_by_a_token(program: gw.Program, rewriter: gw.Rewriter) -> None:
    logits = find(program, "aten.linear", -1)
    put(
        rewriter,
        logits,
        "aten.linear",
        rewriter.call("aten.roll", logits.args[0], [1], [1], like=logits),
        logits.args[1],
    )


@wrong("llama")
def denominator_of_the_example_stored(program: gw.Program, rewriter: gw.Rewriter) -> None:
    """The norm's scale taken from the example once and for all."""
    scale = find(program, "aten.rsqrt", 2)
    put(rewriter, scale, "aten.full_like", scale.args[0], 1.3)
