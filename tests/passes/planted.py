"""Wrong rewrites, and right ones that look like them: the catalogue that ``test_planted_bugs.py`` runs.

Every entry is a small pass as a person might write it on a bad day. It claims to keep its contract.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx, nn

import graphwright as gw
from graphwright.ir.arguments import argument
from graphwright.ir.ops.quantization import pack, unpack
from graphwright.passes.contract import Contract

Edit = Callable[[gw.Program, gw.Rewriter], None]
EXACT = gw.Exact()
# What a weight-only quantiser declares: INT8 is good to a percent or so, INT4 in small groups to a tenth.
INT8 = gw.Approximate(max_local_error=0.03)
INT4 = gw.Approximate(max_local_error=0.2)


@dataclass(frozen=True)
class Entry:
    """One rewrite: which model it is run on and what it claims."""

    name: str
    model: str
    contract: Contract
    edit: Edit

    def make(self) -> gw.Pass:
        """The rewrite as a pass."""
        edit, promised, title = self.edit, self.contract, self.name

        @dataclass(frozen=True, kw_only=True)
        class Planted(gw.Pass):
            name: ClassVar[str] = title
            contract: ClassVar[Contract] = promised

            def run(self, program: gw.Program) -> bool:
                with program.edit() as rewriter:
                    edit(program, rewriter)
                return True

        return Planted()


WRONG: dict[str, Entry] = {}
RIGHT: dict[str, Entry] = {}


def _into(table: dict[str, Entry], model: str, contract: Contract) -> Callable[[Edit], Edit]:
    def register(edit: Edit) -> Edit:
        name = edit.__name__.replace("_", "-")
        assert name not in table
        table[name] = Entry(name, model, contract, edit)
        return edit

    return register


def wrong(model: str, contract: Contract = EXACT) -> Callable[[Edit], Edit]:
    """Add a wrong rewrite."""
    return _into(WRONG, model, contract)


def right(model: str, contract: Contract = EXACT) -> Callable[[Edit], Edit]:
    """Add a right rewrite."""
    return _into(RIGHT, model, contract)


# -- small tools -------------------------------------------------------------------------------------------------------


def find(program: gw.Program, operator: str, number: int = 0, path: str = "") -> fx.Node:
    """A call of an operator, in execution order, in a module whose path contains ``path``."""
    found = [node for node in program.nodes if gw.op_name(node) == operator and path in gw.path_of(node)]
    return found[number]


def put(rewriter: gw.Rewriter, old: fx.Node, target: Any, *args: Any, **kwargs: Any) -> None:
    """Replace a node by a call."""
    rewriter.replace(old, rewriter.call(target, *args, like=old, **kwargs))


def again(rewriter: gw.Rewriter, node: fx.Node) -> fx.Node:
    """The same call once more, to build on while the first is replaced."""
    return rewriter.call(node.target, *node.args, like=node, **node.kwargs)


def stored(rewriter: gw.Rewriter, like: fx.Node, tensor: torch.Tensor, name: str = "planted") -> fx.Node:
    """A new constant."""
    return rewriter.weight(f"{name}.tensor", tensor.detach().clone(), like=like)


def weight_of(program: gw.Program, linear: fx.Node) -> torch.Tensor:
    return program.tensor(argument(linear, "weight")).detach()


def with_weight(program: gw.Program, rewriter: gw.Rewriter, linear: fx.Node, tensor: torch.Tensor) -> None:
    """Give a linear another weight."""
    made = stored(rewriter, linear, tensor)
    put(rewriter, linear, "aten.linear", linear.args[0], made, *linear.args[2:])


# -- sentence embeddings: all-MiniLM-L6-v2 with mean pooling -----------------------------------------------------------


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
    hidden, pooled = program.output.args[0]
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
    hidden, pooled = program.output.args[0]
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


# -- quantised weights -------------------------------------------------------------------------------------------------


def _quantize(
    program: gw.Program,
    rewriter: gw.Rewriter,
    bits: int,
    change: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
) -> None:
    """Asymmetric round-to-nearest in groups of 32, with a change to (packed codes, scales, zero points)."""
    linear = find(program, "aten.linear", 4)
    weight = weight_of(program, linear)
    groups = weight.reshape(weight.shape[0], -1, 32)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scales = (high - low) / (2**bits - 1)
    zeros = (-low / scales).round().clamp(0, 2**bits - 1).to(torch.uint8)
    codes = (groups / scales[..., None]).round() + zeros[..., None]
    codes = codes.clamp(0, 2**bits - 1).to(torch.uint8).reshape(weight.shape)
    packed, scales, zeros = change(pack(codes, bits, 32, zeros), scales, zeros)
    operands = [
        stored(rewriter, linear, value, f"operand_{index}") for index, value in enumerate((packed, scales, zeros))
    ]
    put(rewriter, linear, "graphwright.linear_nbits", linear.args[0], *operands, linear.args[2], bits, 32)


@right("minilm", INT4)
def int4(program: gw.Program, rewriter: gw.Rewriter) -> None:
    _quantize(program, rewriter, 4, lambda packed, scales, zeros: (packed, scales, zeros))


@right("minilm", INT8)
def int8(program: gw.Program, rewriter: gw.Rewriter) -> None:
    _quantize(program, rewriter, 8, lambda packed, scales, zeros: (packed, scales, zeros))


@wrong("minilm", INT4)
def int4_zero_point_off_by_one(program: gw.Program, rewriter: gw.Rewriter) -> None:
    _quantize(program, rewriter, 4, lambda packed, scales, zeros: (packed, scales, zeros - 1))


@wrong("minilm", INT8)
def int8_zero_point_signed(program: gw.Program, rewriter: gw.Rewriter) -> None:
    """128 for every group, as of symmetric codes."""
    _quantize(program, rewriter, 8, lambda packed, scales, zeros: (packed, scales, torch.full_like(zeros, 128)))


@wrong("minilm", INT4)
def int4_scales_halved(program: gw.Program, rewriter: gw.Rewriter) -> None:
    _quantize(program, rewriter, 4, lambda packed, scales, zeros: (packed, scales / 2, zeros))


@wrong("minilm", INT8)
def int8_scales_by_256_steps(program: gw.Program, rewriter: gw.Rewriter) -> None:
    """``(high - low) / 256 * 16``: the step of another width."""
    _quantize(program, rewriter, 8, lambda packed, scales, zeros: (packed, scales * 16 / 17, zeros))


@wrong("minilm", INT4)
def int4_nibbles_swapped(program: gw.Program, rewriter: gw.Rewriter) -> None:
    _quantize(program, rewriter, 4, lambda packed, scales, zeros: ((packed << 4) | (packed >> 4), scales, zeros))


@wrong("minilm", INT4)
def int4_groups_in_reverse(program: gw.Program, rewriter: gw.Rewriter) -> None:
    _quantize(program, rewriter, 4, lambda packed, scales, zeros: (packed, scales.flip(1), zeros.flip(1)))


@wrong("minilm", INT8)
def int8_scales_of_the_next_group(program: gw.Program, rewriter: gw.Rewriter) -> None:
    _quantize(program, rewriter, 8, lambda packed, scales, zeros: (packed, scales.roll(1, 1), zeros))


@wrong("minilm", INT4)
def int4_codes_truncated(program: gw.Program, rewriter: gw.Rewriter) -> None:
    """Three bits kept of four."""

    def truncate(packed: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> tuple[torch.Tensor, ...]:
        codes = (unpack(packed, 4) & 12).flatten(1)
        return pack(codes, 4, 32, None), scales, zeros

    _quantize(program, rewriter, 4, truncate)  # type: ignore[arg-type]


# -- language model: a small Llama with grouped queries, attention spelled out -----------------------------------------


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


# -- language model: a small GPT-2 with tied embeddings ----------------------------------------------------------------


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


class SentenceEmbedder(nn.Module):
    """Mean-pooled, normalised sentence embeddings, as sentence-transformers computes them."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        pooled = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
        return hidden, pooled / torch.linalg.vector_norm(pooled, dim=-1, keepdim=True).clamp_min(1e-12)
