"""Mistakes in the linears, norms, activations and residuals of a sentence embedder (all-MiniLM-L6-v2)."""

from __future__ import annotations

import torch
from tests.passes.planted.catalogue import again, find, put, right, weight_of, with_weight, wrong
from torch import fx

import graphwright as gw


@wrong("minilm")
def layer_norm_epsilon_1e_12_as_1e_5(program: gw.Program, rewriter: gw.Rewriter) -> None:
    norm = find(program, "aten.layer_norm", 4)
    put(rewriter, norm, "aten.layer_norm", *norm.args[:4], 1e-5)


@wrong("minilm")
def layer_norm_weight_and_bias_swapped(program: gw.Program, rewriter: gw.Rewriter) -> None:
    norm = find(program, "aten.layer_norm", 1)
    x, shape, weight, bias, eps = norm.args[:5]
    put(rewriter, norm, "aten.layer_norm", x, shape, bias, weight, eps)


@wrong("minilm")
def layer_norm_over_the_wrong_axis(program: gw.Program, rewriter: gw.Rewriter) -> None:
    """Normalises the heads apart, 32 features each, instead of all 384."""
    norm = find(program, "aten.layer_norm", 2)
    x, _, weight, bias, eps = norm.args[:5]
    heads = rewriter.call("aten.unflatten.int", x, -1, [12, 32], like=norm)
    normed = rewriter.call("aten.layer_norm", heads, [32], None, None, eps, like=norm)
    flat = rewriter.call("aten.flatten.using_ints", normed, 2, like=norm)
    put(rewriter, norm, "aten.add.Tensor", rewriter.call("aten.mul.Tensor", flat, weight, like=norm), bias)


@wrong("minilm")
def layer_norm_weight_of_another_layer(program: gw.Program, rewriter: gw.Rewriter) -> None:
    first, second = find(program, "aten.layer_norm", 1), find(program, "aten.layer_norm", 3)
    put(rewriter, first, "aten.layer_norm", *first.args[:2], *second.args[2:5])


@wrong("minilm")
def layer_norm_with_mean_minus_x(program: gw.Program, rewriter: gw.Rewriter) -> None:
    """Spelled out, with the operands of the difference swapped."""
    norm = find(program, "aten.layer_norm", 3)
    _spell_layer_norm(rewriter, norm, swapped=True)


@wrong("minilm")
def layer_norm_with_unbiased_variance(program: gw.Program, rewriter: gw.Rewriter) -> None:
    _spell_layer_norm(rewriter, find(program, "aten.layer_norm", 3), unbiased=True)


@wrong("minilm")
def layer_norm_epsilon_outside_the_root(program: gw.Program, rewriter: gw.Rewriter) -> None:
    _spell_layer_norm(rewriter, find(program, "aten.layer_norm", 3), outside=True)


@right("minilm")
def layer_norm_spelled_out(program: gw.Program, rewriter: gw.Rewriter) -> None:
    _spell_layer_norm(rewriter, find(program, "aten.layer_norm", 3))


def _spell_layer_norm(
    rewriter: gw.Rewriter, norm: fx.Node, *, swapped: bool = False, unbiased: bool = False, outside: bool = False
) -> None:
    x, _, weight, bias, eps = norm.args[:5]
    mean = rewriter.call("aten.mean.dim", x, [-1], True, like=norm)
    operands = (mean, x) if swapped else (x, mean)
    centred = rewriter.call("aten.sub.Tensor", *operands, like=norm)
    variance = rewriter.call("aten.var.dim", x, [-1], unbiased, True, like=norm)
    if outside:
        eps = 1e-6
        root = rewriter.call("aten.add.Tensor", rewriter.call("aten.sqrt", variance, like=norm), eps, like=norm)
    else:
        root = rewriter.call("aten.sqrt", rewriter.call("aten.add.Tensor", variance, eps, like=norm), like=norm)
    normed = rewriter.call("aten.div.Tensor", centred, root, like=norm)
    scaled = rewriter.call("aten.mul.Tensor", normed, weight, like=norm)
    put(rewriter, norm, "aten.add.Tensor", scaled, bias)


@wrong("minilm")
def bias_dropped(program: gw.Program, rewriter: gw.Rewriter) -> None:
    linear = find(program, "aten.linear", 7)
    put(rewriter, linear, "aten.linear", *linear.args[:2])


@wrong("minilm")
def bias_of_another_linear(program: gw.Program, rewriter: gw.Rewriter) -> None:
    query, key = find(program, "aten.linear", 0), find(program, "aten.linear", 1)
    put(rewriter, key, "aten.linear", *key.args[:2], query.args[2])


@wrong("minilm")
def square_weight_transposed(program: gw.Program, rewriter: gw.Rewriter) -> None:
    linear = find(program, "aten.linear", 2)
    with_weight(program, rewriter, linear, weight_of(program, linear).t())


@wrong("minilm")
def weight_rows_permuted(program: gw.Program, rewriter: gw.Rewriter) -> None:
    linear = find(program, "aten.linear", 4)
    with_weight(program, rewriter, linear, weight_of(program, linear).roll(1, 0))


@wrong("minilm")
def one_weight_off_by_a_percent(program: gw.Program, rewriter: gw.Rewriter) -> None:
    linear = find(program, "aten.linear", 5)
    tensor = weight_of(program, linear).clone()
    tensor[100, 200] *= 1.01
    with_weight(program, rewriter, linear, tensor)


@wrong("minilm")
def weight_rounded_to_half(program: gw.Program, rewriter: gw.Rewriter) -> None:
    linear = find(program, "aten.linear", 5)
    with_weight(program, rewriter, linear, weight_of(program, linear).half().float())


@wrong("minilm")
def activation_rounded_to_bfloat16(program: gw.Program, rewriter: gw.Rewriter) -> None:
    gelu = find(program, "aten.gelu", 0)
    narrow = rewriter.call("aten.to.dtype", again(rewriter, gelu), torch.bfloat16, like=gelu)
    put(rewriter, gelu, "aten.to.dtype", narrow, torch.float32)


@wrong("minilm")
def linears_not_multiplied_in_order(program: gw.Program, rewriter: gw.Rewriter) -> None:
    """``(x Wq) Wk`` in place of ``x Wk``, as a wrong merge would make."""
    query, key = find(program, "aten.linear", 0), find(program, "aten.linear", 1)
    put(rewriter, key, "aten.linear", query, *key.args[1:])


@wrong("minilm")
def gelu_tanh_for_gelu(program: gw.Program, rewriter: gw.Rewriter) -> None:
    gelu = find(program, "aten.gelu", 0)
    put(rewriter, gelu, "aten.gelu", gelu.args[0], approximate="tanh")


@wrong("minilm")
def quick_gelu_for_gelu(program: gw.Program, rewriter: gw.Rewriter) -> None:
    gelu = find(program, "aten.gelu", 0)
    x = gelu.args[0]
    sigmoid = rewriter.call("aten.sigmoid", rewriter.call("aten.mul.Tensor", x, 1.702, like=gelu), like=gelu)
    put(rewriter, gelu, "aten.mul.Tensor", x, sigmoid)


@wrong("minilm")
def relu_for_gelu(program: gw.Program, rewriter: gw.Rewriter) -> None:
    gelu = find(program, "aten.gelu", 0)
    put(rewriter, gelu, "aten.relu", gelu.args[0])


@wrong("minilm")
def residual_dropped(program: gw.Program, rewriter: gw.Rewriter) -> None:
    add = find(program, "aten.add.Tensor", 0, "layer.2.output")
    rewriter.replace(add, add.args[0])


@wrong("minilm")
def residual_doubled(program: gw.Program, rewriter: gw.Rewriter) -> None:
    add = find(program, "aten.add.Tensor", 0, "layer.2.output")
    put(rewriter, add, "aten.add.Tensor", *add.args, alpha=2)


@wrong("minilm")
def residual_from_before_the_norm(program: gw.Program, rewriter: gw.Rewriter) -> None:
    add = find(program, "aten.add.Tensor", 0, "layer.2.output")
    hidden, norm = add.args
    put(rewriter, add, "aten.add.Tensor", hidden, norm.args[0])


@wrong("minilm")
def dropout_scaled_in_eval(program: gw.Program, rewriter: gw.Rewriter) -> None:
    dropout = find(program, "aten.dropout", 2)
    put(rewriter, dropout, "aten.mul.Tensor", dropout.args[0], 1 / 0.9)


@wrong("minilm")
def dropout_turned_on(program: gw.Program, rewriter: gw.Rewriter) -> None:
    dropout = find(program, "aten.dropout", 2)
    put(rewriter, dropout, "aten.dropout", dropout.args[0], 0.1, True)
