"""Mistakes in a small GPT-2, whose logits share the embedding table."""

from __future__ import annotations

import torch
from tests.passes.planted.catalogue import again, find, put, right, stored, weight_of, with_weight, wrong

import graphwright as gw


@wrong("gpt2")
def layer_norm_epsilon_1e_5_as_1e_6(program: gw.Program, rewriter: gw.Rewriter) -> None:
    norm = find(program, "aten.layer_norm", 1)
    put(rewriter, norm, "aten.layer_norm", *norm.args[:4], 1e-6)


@wrong("gpt2")
def split_taken_in_another_order(program: gw.Program, rewriter: gw.Rewriter) -> None:
    """The parts of one linear taken for key, query, value."""
    first, second = find(program, "py.getitem", 0), find(program, "py.getitem", 1)
    split = first.args[0]
    put(rewriter, first, "py.getitem", split, 1, name=None)
    put(rewriter, second, "py.getitem", split, 0, name=None)


@wrong("gpt2")
def split_into_heads_of_the_wrong_axis(program: gw.Program, rewriter: gw.Rewriter) -> None:
    """Every third column instead of each third of the columns."""
    split = find(program, "aten.split.Tensor", 0)
    thirds = rewriter.call("aten.unflatten.int", split.args[0], -1, [32, 3], like=split)
    for index in range(3):
        part = find(program, "py.getitem", 0)
        put(rewriter, part, "aten.select.int", thirds, -1, index)


@wrong("gpt2")
def addmm_without_its_bias(program: gw.Program, rewriter: gw.Rewriter) -> None:
    addmm = find(program, "aten.addmm", 2)
    put(rewriter, addmm, "aten.addmm", *addmm.args, beta=0)


@wrong("gpt2")
def gelu_cube_as_square(program: gw.Program, rewriter: gw.Rewriter) -> None:
    power = find(program, "aten.pow.Tensor_Scalar", 0)
    put(rewriter, power, "aten.pow.Tensor_Scalar", power.args[0], 2.0)


@wrong("gpt2")
def gelu_constant_cut_short(program: gw.Program, rewriter: gw.Rewriter) -> None:
    """0.0447 for 0.044715."""
    power = find(program, "aten.pow.Tensor_Scalar", 0)
    (product,) = power.users
    put(rewriter, product, "aten.mul.Tensor", power, 0.0447)


@wrong("gpt2")
def exact_gelu_for_tanh(program: gw.Program, rewriter: gw.Rewriter) -> None:
    _gelu(program, rewriter, "none")


@right("gpt2")
def gelu_fused(program: gw.Program, rewriter: gw.Rewriter) -> None:
    _gelu(program, rewriter, "tanh")


def _gelu(program: gw.Program, rewriter: gw.Rewriter, approximate: str) -> None:
    shifted = next(iter(find(program, "aten.tanh", 0).users))
    (product,) = shifted.users
    x = product.args[0].args[0]
    put(rewriter, product, "aten.gelu", x, approximate=approximate)


@wrong("gpt2")
def tied_weight_untied_and_changed(program: gw.Program, rewriter: gw.Rewriter) -> None:
    logits = find(program, "aten.linear", -1)
    changed = weight_of(program, logits).clone()
    changed[3] = 0.0
    with_weight(program, rewriter, logits, changed)


@wrong("gpt2")
def embedding_row_zeroed(program: gw.Program, rewriter: gw.Rewriter) -> None:
    """As torch does on creation for a padding_idx, which this model does not have."""
    embedding = find(program, "aten.embedding", 0)
    changed = program.tensor(embedding.args[0]).detach().clone()
    changed[0] = 0.0
    put(rewriter, embedding, "aten.embedding", stored(rewriter, embedding, changed), embedding.args[1])


@wrong("gpt2")
def causal_flag_without_the_padding(program: gw.Program, rewriter: gw.Rewriter) -> None:
    """``is_causal`` in place of a mask that also held the padding."""
    attention = find(program, "aten.scaled_dot_product_attention", 0)
    kwargs = {**attention.kwargs, "is_causal": True}
    put(rewriter, attention, attention.target, *attention.args[:3], None, 0.0, **kwargs)


@wrong("gpt2")
def causal_flag_lost(program: gw.Program, rewriter: gw.Rewriter) -> None:
    """Only the padding is left of the mask."""
    attention = find(program, "aten.scaled_dot_product_attention", 0)
    padding = rewriter.call("aten.to.dtype", program.node("attention_mask"), torch.bool, like=attention)
    for _ in range(2):
        padding = rewriter.call("aten.unsqueeze", padding, 1, like=attention)
    put(rewriter, attention, attention.target, *attention.args[:3], padding, **attention.kwargs)


@wrong("gpt2")
def residual_added_twice(program: gw.Program, rewriter: gw.Rewriter) -> None:
    add = find(program, "aten.add.Tensor", -1, "transformer.h.1")
    put(rewriter, add, "aten.add.Tensor", again(rewriter, add), add.args[0])


@wrong("gpt2")
def last_rows_cut_off(program: gw.Program, rewriter: gw.Rewriter) -> None:
    """An off-by-one slice, made up for by repeating a row."""
    logits = find(program, "aten.linear", -1)
    x = logits.args[0]
    rest = rewriter.call("aten.slice.Tensor", x, 2, 1, 32, like=logits)
    first = rewriter.call("aten.slice.Tensor", x, 2, 1, 2, like=logits)
    put(rewriter, logits, "aten.linear", rewriter.call("aten.cat", [first, rest], 2, like=logits), logits.args[1])


@right("gpt2")
def addmm_as_linear(program: gw.Program, rewriter: gw.Rewriter) -> None:
    addmm = find(program, "aten.addmm", 2)
    bias, x, weight = addmm.args
    turned = stored(rewriter, addmm, program.tensor(weight).detach().t().contiguous())
    put(rewriter, addmm, "aten.linear", x, turned, bias)


@right("gpt2")
def vocabulary_padded(program: gw.Program, rewriter: gw.Rewriter) -> None:
    """Rows that no token reaches, to make their number a multiple of 64."""
    embedding = find(program, "aten.embedding", 0)
    table = program.tensor(embedding.args[0]).detach()
    padded = torch.cat([table, table.new_zeros(128 - table.shape[0], table.shape[1])])
    put(rewriter, embedding, "aten.embedding", stored(rewriter, embedding, padded), embedding.args[1])


@right("gpt2")
def tied_weight_kept(program: gw.Program, rewriter: gw.Rewriter) -> None:
    logits = find(program, "aten.linear", -1)
    turned = rewriter.call("aten.t", logits.args[1], like=logits)
    put(rewriter, logits, "aten.matmul", logits.args[0], turned)
