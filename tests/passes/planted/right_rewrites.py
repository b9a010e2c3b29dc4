"""Right rewrites of a sentence embedder, of the same kinds as the wrong ones."""

from __future__ import annotations

import math

import torch
from tests.passes.planted.catalogue import find, put, right, stored, weight_of

import graphwright as gw


@right("minilm")
def linear_as_matmul_and_add(program: gw.Program, rewriter: gw.Rewriter) -> None:
    linear = find(program, "aten.linear", 4)
    x, weight, bias = linear.args
    product = rewriter.call("aten.matmul", x, rewriter.call("aten.t", weight, like=linear), like=linear)
    put(rewriter, linear, "aten.add.Tensor", product, bias)


@right("minilm")
def residual_the_other_way_round(program: gw.Program, rewriter: gw.Rewriter) -> None:
    add = find(program, "aten.add.Tensor", 0, "layer.2.output")
    put(rewriter, add, "aten.add.Tensor", *reversed(add.args))


@right("minilm")
def attention_scale_written_out(program: gw.Program, rewriter: gw.Rewriter) -> None:
    attention = find(program, "aten.scaled_dot_product_attention", 2)
    put(rewriter, attention, attention.target, *attention.args, **{**attention.kwargs, "scale": 32**-0.5})


@right("minilm")
def attention_scale_moved_into_the_query(program: gw.Program, rewriter: gw.Rewriter) -> None:
    attention = find(program, "aten.scaled_dot_product_attention", 2)
    scaled = rewriter.call("aten.mul.Tensor", attention.args[0], 32**-0.5, like=attention)
    put(rewriter, attention, attention.target, scaled, *attention.args[1:], **{**attention.kwargs, "scale": 1.0})


@right("minilm")
def gelu_spelled_out(program: gw.Program, rewriter: gw.Rewriter) -> None:
    gelu = find(program, "aten.gelu", 0)
    x = gelu.args[0]
    erf = rewriter.call("aten.erf", rewriter.call("aten.div.Tensor", x, math.sqrt(2.0), like=gelu), like=gelu)
    half = rewriter.call("aten.mul.Tensor", x, 0.5, like=gelu)
    put(rewriter, gelu, "aten.mul.Tensor", half, rewriter.call("aten.add.Tensor", erf, 1.0, like=gelu))


@right("minilm")
def dropout_that_is_off_removed(program: gw.Program, rewriter: gw.Rewriter) -> None:
    dropout = find(program, "aten.dropout", 2)
    rewriter.replace(dropout, dropout.args[0])


@right("minilm")
def quotient_as_product(program: gw.Program, rewriter: gw.Rewriter) -> None:
    division = find(program, "aten.div.Tensor", 0)
    numerator, divisor = division.args
    put(rewriter, division, "aten.mul.Tensor", numerator, rewriter.call("aten.reciprocal", divisor, like=division))


@right("minilm")
def neurons_of_a_feed_forward_block_reordered(program: gw.Program, rewriter: gw.Rewriter) -> None:
    """Rows of the first weight and bias, columns of the second: the block computes the same."""
    up, down = find(program, "aten.linear", 4), find(program, "aten.linear", 5)
    order = torch.randperm(1536, generator=torch.Generator().manual_seed(3))
    first = stored(rewriter, up, weight_of(program, up)[order], "up_weight")
    bias = stored(rewriter, up, program.tensor(up.args[2]).detach()[order], "up_bias")
    second = stored(rewriter, down, weight_of(program, down)[:, order], "down_weight")
    gelu = down.args[0]
    new_up = rewriter.call("aten.linear", up.args[0], first, bias, like=up)
    new_gelu = rewriter.call("aten.gelu", new_up, like=gelu)
    put(rewriter, down, "aten.linear", new_gelu, second, down.args[2])
