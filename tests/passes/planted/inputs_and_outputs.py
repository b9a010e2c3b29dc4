"""Mistakes at the edges of a sentence embedder: lookups, pooling, sizes, constants, whole tensors."""

from __future__ import annotations

import torch
from tests.passes.planted.catalogue import again, find, put, results, stored, wrong

import graphwright as gw


@wrong("minilm")
def positions_off_by_one(program: gw.Program, rewriter: gw.Rewriter) -> None:
    positions = find(program, "aten.slice.Tensor", 0, "embeddings")
    table, _, _, end = positions.args
    later = rewriter.call("py.add", end, 1, like=positions)
    shifted = rewriter.call("aten.slice.Tensor", table, 1, 1, later, like=positions)
    rewriter.replace(positions, shifted)


@wrong("minilm")
def token_ids_off_by_one(program: gw.Program, rewriter: gw.Rewriter) -> None:
    """As if row 0 had been taken for a padding row that is not stored."""
    embedding = find(program, "aten.embedding", 0, "word_embeddings")
    table, ids = embedding.args[:2]
    shifted = rewriter.call("aten.sub.Tensor", ids, 1, like=embedding)
    put(rewriter, embedding, "aten.embedding", table, rewriter.call("aten.clamp_min", shifted, 0, like=embedding))


@wrong("minilm")
def token_ids_narrowed_to_8_bits(program: gw.Program, rewriter: gw.Rewriter) -> None:
    embedding = find(program, "aten.embedding", 0, "word_embeddings")
    table, ids = embedding.args[:2]
    narrow = rewriter.call("aten.to.dtype", ids, torch.uint8, like=embedding)
    wide = rewriter.call("aten.to.dtype", narrow, torch.int64, like=embedding)
    put(rewriter, embedding, "aten.embedding", table, wide)


@wrong("minilm")
def position_embedding_dropped(program: gw.Program, rewriter: gw.Rewriter) -> None:
    add = find(program, "aten.add.Tensor", 1, "embeddings")
    rewriter.replace(add, add.args[0])


@wrong("minilm")
def two_nodes_taken_for_one(program: gw.Program, rewriter: gw.Rewriter) -> None:
    """Common subexpressions by shape and operator, forgetting the weights."""
    rewriter.replace(find(program, "aten.linear", 1), find(program, "aten.linear", 0))


@wrong("minilm")
def batch_baked_in(program: gw.Program, rewriter: gw.Rewriter) -> None:
    """The example has two rows; so does the program from now on."""
    reshape = find(program, "aten.view", 0)
    x, (_, *rest) = reshape.args
    reshape.args = (x, [2, *rest])
    rewriter.changed = True


@wrong("minilm")
def sequence_baked_in(program: gw.Program, rewriter: gw.Rewriter) -> None:
    positions = find(program, "aten.slice.Tensor", 0, "embeddings")
    table, dim, start, _ = positions.args
    positions.args = (table, dim, start, 16)
    rewriter.changed = True


@wrong("minilm")
def mask_of_the_example_stored(program: gw.Program, rewriter: gw.Rewriter) -> None:
    """An input-dependent value folded: every token is taken for a real one."""
    mask = find(program, "aten.to.device", 0)
    put(rewriter, mask, "aten.ones_like", mask)
    mask = find(program, "aten.ones_like", 0)
    mask.args = (program.node("attention_mask"),)
    mask.kwargs = {"dtype": torch.bool}


@wrong("minilm")
def mean_stored(program: gw.Program, rewriter: gw.Rewriter) -> None:
    """The denominators of the example's mean folded into a constant."""
    clamp = find(program, "aten.clamp", 0)
    put(rewriter, clamp, "aten.full_like", clamp.args[0], 13.0)


@wrong("minilm")
def mean_pooling_forgets_the_mask(program: gw.Program, rewriter: gw.Rewriter) -> None:
    division = find(program, "aten.div.Tensor", 0)
    hidden = find(program, "aten.layer_norm", -1)
    put(rewriter, division, "aten.mean.dim", hidden, [1])


@wrong("minilm")
def sum_over_the_wrong_axis(program: gw.Program, rewriter: gw.Rewriter) -> None:
    """Rows are summed up, and the sum handed to each of them."""
    total = find(program, "aten.sum.dim_IntList", 0)
    rows = rewriter.call("aten.sum.dim_IntList", total.args[0], [0], True, like=total)
    row = rewriter.call("aten.expand_as", rows, total.args[0], like=total)
    put(rewriter, total, "aten.select.int", row, 1, 0)


@wrong("minilm")
def first_token_pooled(program: gw.Program, rewriter: gw.Rewriter) -> None:
    division = find(program, "aten.div.Tensor", 0)
    put(rewriter, division, "aten.select.int", find(program, "aten.layer_norm", -1), 1, 0)


@wrong("minilm")
def quotient_turned_over(program: gw.Program, rewriter: gw.Rewriter) -> None:
    division = find(program, "aten.div.Tensor", -1)
    numerator, divisor = division.args
    put(rewriter, division, "aten.div.Tensor", divisor, numerator)


@wrong("minilm")
def normalisation_lost(program: gw.Program, rewriter: gw.Rewriter) -> None:
    division = find(program, "aten.div.Tensor", -1)
    rewriter.replace(division, division.args[0])


@wrong("minilm")
def outputs_in_another_order(program: gw.Program, rewriter: gw.Rewriter) -> None:
    hidden, pooled = results(program)
    program.output.args = ((pooled, hidden),)
    rewriter.changed = True


@wrong("minilm")
def nan_where_x_is_negative(program: gw.Program, rewriter: gw.Rewriter) -> None:
    gelu = find(program, "aten.gelu", 0)
    root = rewriter.call("aten.sqrt", gelu.args[0], like=gelu)
    put(rewriter, gelu, "aten.gelu", rewriter.call("aten.pow.Tensor_Scalar", root, 2, like=gelu))


@wrong("minilm")
def nan_in_padded_rows_only(program: gw.Program, rewriter: gw.Rewriter) -> None:
    """0 · inf where the mask is 0."""
    total = find(program, "aten.sum.dim_IntList", 0)
    product = total.args[0]
    mask = product.args[1]
    inverse = rewriter.call("aten.reciprocal", mask, like=product)
    once = again(rewriter, product)
    put(rewriter, product, "aten.mul.Tensor", once, rewriter.call("aten.mul.Tensor", inverse, mask, like=product))


@wrong("minilm")
def batch_of_one_squeezed(program: gw.Program, rewriter: gw.Rewriter) -> None:
    """Goes unnoticed until somebody embeds a single sentence."""
    pooled = find(program, "aten.div.Tensor", 0)
    put(rewriter, pooled, "aten.squeeze.dim", again(rewriter, pooled), 0)


@wrong("minilm")
def sequence_of_one_squeezed(program: gw.Program, rewriter: gw.Rewriter) -> None:
    """Goes unnoticed until somebody embeds a single token."""
    hidden = find(program, "aten.layer_norm", -1)
    put(rewriter, hidden, "aten.squeeze.dim", again(rewriter, hidden), 1)


@wrong("minilm")
def dtype_of_an_output_widened(program: gw.Program, rewriter: gw.Rewriter) -> None:
    hidden, pooled = results(program)
    program.output.args = ((hidden, rewriter.call("aten.to.dtype", pooled, torch.float64, like=pooled)),)


@wrong("minilm")
def late_position_changed(program: gw.Program, rewriter: gw.Rewriter) -> None:
    """A row of the position table that only long inputs reach."""
    embedding = find(program, "aten.embedding", 0, "position_embeddings")
    changed = program.tensor(embedding.args[0]).detach().clone()
    changed[400] += 0.01
    put(rewriter, embedding, "aten.embedding", stored(rewriter, embedding, changed), embedding.args[1])


@wrong("minilm")
def activations_shared_between_rows(program: gw.Program, rewriter: gw.Rewriter) -> None:
    """The maximum that a softmax subtracts is taken over the batch, and not given back: rows depend on each other."""
    gelu = find(program, "aten.gelu", 0)
    once = again(rewriter, gelu)
    largest = rewriter.call("aten.amax", once, [0], True, like=gelu)
    put(rewriter, gelu, "aten.sub.Tensor", once, rewriter.call("aten.mul.Tensor", largest, 1e-6, like=gelu))


@wrong("minilm")
def clamped_to_six(program: gw.Program, rewriter: gw.Rewriter) -> None:
    """ReLU6's limit, which only the largest activations meet."""
    linear = find(program, "aten.linear", 4)
    put(rewriter, linear, "aten.clamp", again(rewriter, linear), -6.0, 6.0)


@wrong("minilm")
def weight_written_in_place(program: gw.Program, rewriter: gw.Rewriter) -> None:
    with torch.no_grad():
        program.tensor("encoder.encoder.layer.0.attention.self.query.weight").mul_(1.0001)
