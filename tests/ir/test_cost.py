"""The cost model against counts made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.ir.models import encoder_inputs, encoder_program
from torch import nn

from graphwright.frontends.torch import trace
from graphwright.ir.cost import ProgramCost, cost_of
from graphwright.ir.errors import InputError
from graphwright.ir.ops.definition import Cost
from graphwright.ir.parser import parse
from graphwright.ir.program import Program


def of_line(line: str, inputs: str = '%x = input "x" : f32[batch, 4]', **sizes: int) -> ProgramCost:
    """Cost of a program of one call %y."""
    text = f"program P(batch: 1..@3, length: 1..@5) {{\n {inputs}\n {line}\n return %y\n}}"
    return cost_of(parse(text), sizes)


# -- real models, by hand ----------------------------------------------------------------------------------------------


def test_a_bert_by_hand(minilm_program: Program, minilm_dir: Path) -> None:
    config = json.loads((minilm_dir / "config.json").read_text())
    width, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    rows, length = 8, 128
    linear = rows * length * (4 * width * width + 2 * width * inner)
    attention = 2 * rows * length * length * width
    cost = cost_of(minilm_program, {"batch": rows, "sequence": length})
    assert cost.total.macs == layers * (linear + attention) + rows * width * width
    tables = (config["vocab_size"] + config["max_position_embeddings"] + config["type_vocab_size"]) * width
    norms = (2 * layers + 1) * 2 * width
    dense = layers * (4 * width * (width + 1) + inner * (width + 1) + width * (inner + 1)) + width * (width + 1)
    buffers = 2 * config["max_position_embeddings"]  # position and token type ids
    assert cost.parameters == tables + norms + dense + buffers
    assert cost.total.weight_bytes == 4 * (tables + norms + dense) + 8 * buffers
    assert cost.unknown == ()


def test_a_llama_by_hand(tinylm_program: Program, tinylm_dir: Path) -> None:
    config = json.loads((tinylm_dir / "config.json").read_text())
    width, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    heads, shared = config["num_attention_heads"], config["num_key_value_heads"]
    head = width // heads
    rows, length = 2, 64
    projections = 2 * width * width + 2 * width * shared * head + 3 * width * inner
    attention = 2 * rows * heads * length * length * head
    positions = length * head // 2 if _multiplies_positions(tinylm_program) else 0
    cost = cost_of(tinylm_program, {"batch": rows, "sequence": length})
    vocabulary = rows * length * width * config["vocab_size"]
    assert cost.total.macs == layers * (rows * length * projections + attention) + vocabulary + positions
    weights = config["vocab_size"] * width + layers * (projections + 2 * width) + width
    inverse_frequencies = head // 2
    assert cost.parameters == weights + inverse_frequencies
    assert cost.total.weight_bytes == 2 * weights + 4 * inverse_frequencies, "the tied embedding counts once"


def _multiplies_positions(program: Program) -> bool:
    """Some releases of transformers compute the rotary angles by a matrix product."""
    return any(
        node.op == "call_function" and "rotary" in node.meta["path"] and "matmul" in node.name for node in program.nodes
    )


def test_sizes_change_the_work_but_not_the_weights(minilm_program: Program) -> None:
    small, large = cost_of(minilm_program), cost_of(minilm_program, {"batch": 4})
    assert dict(small.sizes) == {"batch": 2, "sequence": 7}, "the traced sizes by default"
    assert dict(large.sizes) == {"batch": 4, "sequence": 7}
    assert large.total.macs == 2 * small.total.macs
    assert large.total.weight_bytes == small.total.weight_bytes
    assert large.parameters == small.parameters


# -- operators, by hand ------------------------------------------------------------------------------------------------


class Calls(nn.Module):
    """A module of one expression."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
        return self.function(x, y)


@pytest.mark.parametrize(
    ("function", "x", "y", "macs"),
    [
        (torch.matmul, (2, 3, 4), (4, 5), 2 * 3 * 4 * 5),
        (torch.matmul, (4,), (4,), 4),
        (torch.matmul, (3, 4), (4,), 12),
        (torch.matmul, (4,), (4, 5), 20),
        (torch.matmul, (7, 1, 3, 4), (2, 4, 5), 7 * 2 * 3 * 4 * 5),
        (torch.mm, (3, 4), (4, 5), 60),
        (torch.bmm, (2, 3, 4), (2, 4, 5), 120),
        (torch.mv, (3, 4), (4,), 12),
        (torch.dot, (4,), (4,), 4),
        (lambda x, y: torch.addmm(x.sum(), x, y), (3, 4), (4, 5), 60),
        (lambda x, y: torch.baddbmm(x.sum(), x, y), (2, 3, 4), (2, 4, 5), 120),
        (lambda x, y: torch.addmv(x.sum(), x, y), (3, 4), (4,), 12),
        (nn.functional.linear, (2, 3, 4), (5, 4), 120),
        (nn.functional.conv1d, (2, 3, 10), (5, 3, 4), 2 * 5 * 7 * 3 * 4),
        (lambda x, y: nn.functional.conv1d(x, y, padding="same"), (2, 3, 10), (5, 3, 3), 2 * 5 * 10 * 3 * 3),
        (lambda x, y: nn.functional.conv2d(x, y, stride=2, groups=2), (1, 4, 9, 9), (6, 2, 3, 3), 6 * 16 * 2 * 9),
        (nn.functional.conv3d, (1, 2, 4, 4, 4), (3, 2, 2, 2, 2), 3 * 27 * 2 * 8),
        (nn.functional.conv_transpose1d, (2, 3, 10), (3, 5, 4), 2 * 3 * 10 * 5 * 4),
        (lambda x, y: nn.functional.conv_transpose2d(x, y, groups=2), (1, 4, 5, 5), (4, 3, 2, 2), 4 * 25 * 3 * 4),
        (lambda x, y: torch.einsum("bij,jk->bik", x, y), (2, 3, 4), (4, 5), 120),
        (lambda x, y: torch.einsum("...ij,...jk", x, y), (7, 3, 4), (2, 1, 4, 5), 2 * 7 * 3 * 4 * 5),
        (lambda x, y: torch.einsum("ij,kj->", x, y), (3, 4), (5, 4), 60),
        (
            lambda x, y: nn.functional.scaled_dot_product_attention(x, y, y),
            (2, 6, 3, 8),
            (2, 6, 5, 8),
            2 * 6 * 3 * 5 * 16,
        ),
        (lambda x, y: x * y + x.exp(), (3, 4), (3, 4), 0),
        (lambda x, y: nn.functional.layer_norm(x, (4,)) + y.softmax(-1), (3, 4), (3, 4), 0),
    ],
)
def test_multiply_accumulates(function: Any, x: tuple[int, ...], y: tuple[int, ...], macs: int) -> None:
    program = trace(Calls(function), (torch.rand(x), torch.rand(y)), dynamic=None)
    assert cost_of(program).total.macs == macs


def test_three_operands_are_multiplied_two_at_a_time() -> None:
    class Product(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
            return torch.einsum("ij,jk,kl->il", x, y, z)

    shapes = (2, 3), (3, 5), (5, 7)
    program = trace(Product(), tuple(map(torch.rand, shapes)), dynamic=None)
    assert cost_of(program).total.macs == 2 * 3 * 5 + 2 * 5 * 7


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
def test_recurrent_layers(kind: Any, gates: int) -> None:
    program = trace(kind(6, 8, num_layers=2, batch_first=True), torch.rand(3, 5, 6), dynamic=None)
    step = gates * 8 * (6 + 8) + gates * 8 * (8 + 8)
    assert cost_of(program).total.macs == 3 * 5 * step


@pytest.mark.parametrize(
    ("line", "inputs", "macs"),
    [
        (
            "%y = graphwright.attention(%q, %k, %k, None, None, 0.5, True, 0)",
            '%q = input "q" : f32[batch, 6, length, 8]\n %k = input "k" : f32[batch, 2, 7, 8]',
            3 * 6 * 5 * 7 * 16,
        ),
        (
            "%y = graphwright.linear_nbits(%x, %w, %s, None, None, 4, 32)",
            '%x = input "x" : f32[batch, length, 64]\n %w = buffer "w" : u8[10, 2, 16]\n %s = buffer "s" : f32[10, 2]',
            3 * 5 * 64 * 10,
        ),
        (
            '%y = graphwright.linear_int8_dynamic(%x, %w, %s, None, "per_token")',
            '%x = input "x" : f32[batch, 64]\n %w = buffer "w" : i8[10, 64]\n %s = buffer "s" : f32[10]',
            3 * 64 * 10,
        ),
        ("%y = graphwright.rms_norm(%x, None, 1e-06)", '%x = input "x" : f32[batch, 64]', 0),
        ('%y = graphwright.gated_activation(%x, %x, "silu")', '%x = input "x" : f32[batch, 64]', 0),
    ],
)
def test_dialect_operators_count_what_their_definition_says(line: str, inputs: str, macs: int) -> None:
    assert of_line(line, inputs).total.macs == macs


# -- bytes -------------------------------------------------------------------------------------------------------------


def test_bytes_read_and_written() -> None:
    inputs = '%w = weight "w" : f32[5, 4]\n %b = weight "b" : f32[5]\n %x = input "x" : f32[batch, 4]'
    cost = of_line("%y = aten.linear(%x, %w, %b)", inputs, batch=10)
    (node,) = cost.nodes
    assert node.op == "aten.linear"
    assert node.parameters == 25
    assert node.cost == Cost(macs=10 * 4 * 5, weight_bytes=25 * 4, activation_bytes=10 * 4 * 4 + 10 * 5 * 4)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("%y = aten.view(%x, [-1])", 0),
        ("%y = aten.transpose.int(%x, 0, 1)", 0),
        ("%y = aten.dropout(%x, 0.1, False)", 0),
        ("%y = aten.dropout(%x, 0.1, True)", 2 * 48),
        ("%y = aten.sym_size.int(%x, 0)", 0),
        ("%y = aten._assert_tensor_metadata(%x, None, None, f32)", 0),
        ("%y = aten.zeros_like(%x)", 48),
        ("%y = aten.new_ones(%x, [2])", 8),
        ("%y = aten.to.dtype(%x, f64)", 48 + 96),
        ("%y = aten.sum.dim_IntList(%x, [1])", 48 + 12),
        ("%y = aten.max.dim(%x, 1)", 48 + 12 + 24),
        ("%y = aten.add.Tensor(%x, %x)", 2 * 48),
    ],
)
def test_activation_bytes(line: str, expected: int) -> None:
    text = f'program P(batch: 1..@3) {{\n %x = input "x" : f32[batch, 4]\n {line}\n return %x\n}}'
    assert cost_of(parse(text)).total.activation_bytes == expected


@pytest.mark.parametrize(("rows", "read"), [(2, 2 * 5), (7, 30)])
def test_a_look_up_reads_its_rows(rows: int, read: int) -> None:
    inputs = '%w = weight "w" : f32[30, 8]\n %x = input "x" : i64[batch, length]'
    cost = of_line("%y = aten.embedding(%w, %x)", inputs, batch=rows)
    assert cost.nodes[0].cost.weight_bytes == read * 8 * 4, "the table at most"
    assert cost.nodes[0].parameters == 240
    assert cost.total.weight_bytes == 30 * 8 * 4
    packed = (
        '%w = buffer "w" : u8[30, 2, 4]\n %s = buffer "s" : f32[30, 2]\n %z = buffer "z" : u8[30, 2]\n'
        ' %x = input "x" : i64[batch, length]'
    )
    cost = of_line("%y = graphwright.embedding_nbits(%x, %w, %s, %z, 4, 8, 16)", packed, batch=rows)
    assert cost.nodes[0].cost.weight_bytes == read * (8 + 8 + 2)


def test_a_weight_read_twice_counts_once_in_total() -> None:
    _, program = encoder_program()
    cost = cost_of(program)
    whole = sum(tensor.numel() for tensor in program.tensors().values())
    assert cost.parameters == whole
    assert cost.total.weight_bytes == 4 * whole
    embedding, head = (node for node in cost.nodes if node.parameters == 13 * 8)
    assert {embedding.path, head.path} == {"embed", "head"}
    rows = encoder_inputs()["ids"].numel()
    assert embedding.cost.weight_bytes == 4 * 8 * min(rows, 13)
    assert head.cost.weight_bytes == 4 * 13 * 8


# -- sizes and tables --------------------------------------------------------------------------------------------------


def test_sizes_written_as_expressions() -> None:
    cost = of_line("%y = aten.cat([%x, %x, %x])", batch=7)
    assert cost.total.activation_bytes == 7 * 16 + 21 * 16
    halves = of_line("%y = aten.slice.Tensor(%x, 0, 1, 9223372036854775807, 2)", batch=8)
    assert halves.total.activation_bytes == 0
    both = of_line("%v = aten.slice.Tensor(%x, 0, 1, 9223372036854775807, 2)\n %y = aten.neg(%v)", batch=8)
    assert both.total.activation_bytes == 2 * 4 * 16


def test_sizes_that_depend_on_values_count_as_one_and_are_told() -> None:
    cost = of_line("%n = aten.nonzero(%x)\n %y = aten.mul.Tensor(%n, 2)")
    assert cost.unknown == ("n", "y")
    assert cost.nodes[1].cost.activation_bytes == 2 * 2 * 8


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ({"width": 3}, "the program has no dimension 'width'\n  -> it has batch, sequence"),
        ({"batch": 0}, r"0 is not a size the program takes (1..) (at dimension 'batch')"),
        ({"sequence": 513}, r"513 is not a size the program takes (1..512) (at dimension 'sequence')"),
        ({"batch": 2.5}, r"2.5 is not a size"),
        ({"batch": True}, r"True is not a size"),
    ],
)
def test_impossible_sizes(sizes: dict[str, Any], says: str, minilm_program: Program) -> None:
    with pytest.raises(InputError) as caught:
        cost_of(minilm_program, sizes)
    assert says in str(caught.value)


def test_tables_by_module() -> None:
    _, program = encoder_program()
    cost = cost_of(program, {"batch": 3})
    by_layer = cost.by_module(2)
    linear = 3 * 5 * 8 * 16
    assert by_layer["layers.0"].macs == by_layer["layers.1"].macs == 2 * linear
    assert cost.by_module(1)["layers"].macs == 4 * linear
    assert cost.by_module(3)["layers.0.2"].macs == linear
    assert sum(item.macs for item in by_layer.values()) == cost.total.macs
    lines = cost.table(1).splitlines()
    assert lines[0].split() == ["module", "MACs", "weight", "bytes", "activation", "bytes"]
    assert [line.split()[0] for line in lines] == ["module", *cost.by_module(1), "total"]
    assert lines[-1].split()[1] == f"{cost.total.macs:,}"
    assert len({len(line) for line in lines}) == 1, "columns line up"
