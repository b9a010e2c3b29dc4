"""``QuantizeEmbeddings``: tables as integers, alone or with the head that is tied to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import graphwright as gw
from graphwright.ir.ops.quantization import dequantize
from graphwright.ir.provenance import add_tags

Listing = Callable[[gw.Program], list[str]]
IDS = torch.tensor([[0, 3, 29, 3], [1, 1, 7, 11]])


class Model(nn.Module):
    """Words and positions, a linear, and a head that may share the words' table."""

    def __init__(self, tied: bool = False, dtype: torch.dtype = torch.float32, bias: bool = False) -> None:
        super().__init__()
        self.words = nn.Embedding(30, 24, padding_idx=0, dtype=dtype)
        self.positions = nn.Embedding(64, 24, dtype=dtype)
        self.mix = nn.Linear(24, 24, dtype=dtype)
        self.head = nn.Linear(24, 30, bias=bias, dtype=dtype)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        places = torch.arange(ids.shape[1], device=ids.device)
        logits: torch.Tensor = self.head(torch.tanh(self.mix(self.words(ids) + self.positions(places))))
        return logits


def operators(program: gw.Program) -> list[str]:
    return [gw.op_name(node) for node in program.nodes if node.op == "call_function"]


def reasons(program: gw.Program, item: gw.Pass) -> list[str]:
    return [refusal.reason for refusal in item.refusals(program)]


def table(program: gw.Program, base: str, bits: int) -> torch.Tensor:
    tensors = program.tensors()
    zeros = tensors.get(f"{base}.zero_points")
    return dequantize(tensors[f"{base}.qweight"], tensors[f"{base}.scales"], zeros, bits, 24, torch.float32)


def test_before_and_after(listing: Listing) -> None:
    program = gw.trace(nn.Sequential(nn.Embedding(30, 24)), IDS)
    (line,) = listing(program)
    assert line.startswith("%embedding = aten.embedding(")
    item = gw.QuantizeEmbeddings(bits=8, group_size=16, symmetric=False)
    assert item(program) is True
    (line,) = listing(program)
    assert "graphwright.embedding_nbits(" in line
    assert line.endswith("8, 16, 24)")
    assert set(program.tensors()) == {"0.qweight", "0.scales", "0.zero_points"}
    gw.verify(program)
    assert item(program) is False


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [16, None])
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_table_gives_its_rounded_rows(bits: int, group: int | None, symmetric: bool) -> None:
    model = Model()
    program = gw.trace(model, IDS)
    gw.QuantizeEmbeddings(bits=bits, group_size=group, symmetric=symmetric)(program)
    assert operators(program).count("graphwright.embedding_nbits") == 2
    words, positions = table(program, "words", bits), table(program, "positions", bits)
    assert (words - model.words.weight).norm() / model.words.weight.norm() < {2: 0.42, 3: 0.21, 4: 0.12, 8: 0.01}[bits]
    assert (words[0] == 0).all()  # the padding row
    hidden = torch.tanh(model.mix(words[IDS] + positions[: IDS.shape[1]]))
    torch.testing.assert_close(program(IDS), model.head(hidden), rtol=1e-4, atol=1e-5)


def test_tables_in_half_precision_keep_their_type() -> None:
    model = Model(dtype=torch.bfloat16)
    program = gw.trace(model, IDS)
    gw.QuantizeEmbeddings()(program)
    gw.verify(program)
    found, exact = program(IDS), model(IDS)
    assert found.dtype == torch.bfloat16
    assert (found.float() - exact.float()).norm() / exact.float().norm() < 0.02


# -- tied tables -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_a_tied_table_and_its_head_share_the_packed_storage(bias: bool) -> None:
    model = Model(tied=True, bias=bias)
    small = gw.optimize(
        model,
        [gw.QuantizeEmbeddings(bits=8, group_size=16, tied=True, where="words"), gw.QuantizeLinears(bits=8)],
        example_inputs=IDS,
    )
    names = set(small.tensors())
    assert {"words.qweight", "words.scales", "mix.qweight", "positions.weight"} <= names
    assert not any(name.startswith("head.") and name != "head.bias" for name in names)
    lookup = next(node for node in small.nodes if gw.op_name(node) == "graphwright.embedding_nbits")
    head = [node for node in small.nodes if gw.op_name(node) == "graphwright.linear_nbits"][-1]
    assert lookup.args[1:4] == head.args[1:4]
    exact = model(IDS)
    assert (small(IDS) - exact).norm() / exact.norm() < 0.02


def test_a_tied_table_is_left_alone_unless_told() -> None:
    program = gw.trace(Model(tied=True), IDS)
    item = gw.QuantizeEmbeddings(where="words")
    (reason, other) = reasons(program, item)
    assert "its table is tied to %linear_1" in reason
    assert "set tied=True to quantise both" in reason
    assert other == "not selected by where= / ignore="
    assert item(program) is False
    assert program.tensor("words.weight") is program.tensor("head.weight")


def test_tied_storage_survives_saving(tmp_path: Any) -> None:
    program = gw.trace(Model(tied=True), IDS)
    gw.QuantizeEmbeddings(tied=True)(program)
    program.save(tmp_path / "small")
    loaded = gw.Program.load(tmp_path / "small")
    assert set(loaded.tensors()) == set(program.tensors())
    assert torch.equal(loaded(IDS), program(IDS))


# -- refusals ----------------------------------------------------------------------------------------------------------


class Twice(nn.Module):
    """One table, looked up by two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Embedding(30, 24), nn.Embedding(30, 24)
        self.right.weight = self.left.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        total: torch.Tensor = self.left(ids) + self.right(ids + 0)
        return total


def test_tables_of_several_lookups_are_quantised_together_or_not_at_all() -> None:
    program = gw.trace(Twice(), IDS)
    item = gw.QuantizeEmbeddings(where="left")
    assert "is also read by %embedding_1, which is not selected, and would be stored twice" in reasons(program, item)[0]
    assert item(program) is False
    assert gw.QuantizeEmbeddings()(program)
    assert operators(program).count("graphwright.embedding_nbits") == 2
    assert set(program.tensors()) == {"left.qweight", "left.scales"}


@pytest.mark.parametrize("tag", ["adapter", "masked"])
def test_protected_tags_on_a_lookup_or_on_the_tied_head(tag: str) -> None:
    program = gw.trace(Model(tied=True), IDS)
    lookup = next(node for node in program.nodes if gw.op_name(node) == "aten.embedding")
    add_tags(lookup, [tag])
    item = gw.QuantizeEmbeddings(tied=True, where="words")
    assert reasons(program, item)[0] == f"it is tagged {tag}, which this pass leaves alone"
    program = gw.trace(Model(tied=True), IDS)
    head = [node for node in program.nodes if gw.op_name(node) == "aten.linear"][-1]
    add_tags(head, [tag])
    assert reasons(program, item)[0] == (
        f"%{head.name}, which reads the same table, is tagged {tag}, which this pass leaves alone"
    )
    assert item(program) is False


class Lookup(nn.Module):
    def __init__(self, function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        self.function = function
        self.table = nn.Parameter(torch.randn(30, 24, dtype=dtype))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.function(ids, self.table)


REFUSED: dict[str, tuple[Callable[[torch.Tensor, torch.Tensor], torch.Tensor], torch.dtype, str]] = {
    "computed": (
        lambda ids, table: functional.embedding(ids, table * 2),
        torch.float32,
        "its table is computed by %mul, not a constant",
    ),
    "double": (functional.embedding, torch.float64, "its table is torch.float64"),
    "frequencies": (
        lambda ids, table: functional.embedding(ids, table, scale_grad_by_freq=True),
        torch.float32,
        "it trains with options that a quantised table does not have",
    ),
    "not a linear": (
        lambda ids, table: functional.embedding(ids, table) * table.sum(),
        torch.float32,
        "its table is also read by %sum_1, which is not a linear",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_every_refusal_has_its_reason(case: str) -> None:
    function, dtype, reason = REFUSED[case]
    program = gw.trace(Lookup(function, dtype), IDS)
    before = str(program)
    item = gw.QuantizeEmbeddings(tied=True)
    assert reasons(program, item) == [reason]
    assert item(program) is False
    assert str(program) == before


def test_a_table_with_infinity_is_named() -> None:
    model = Model()
    with torch.no_grad():
        model.words.weight[4, 4] = float("inf")
    program = gw.trace(Model(), IDS)
    program.set_tensor("words.weight", model.words.weight)
    with pytest.raises(gw.InputError, match="NaN or infinity .*weight 'words.weight'"):
        gw.QuantizeEmbeddings()(program)
    assert "words.weight" in program.tensors()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 5}, "must be 2, 3, 4 or 8, not 5"),
        ({"group_size": 8}, "multiple of 16"),
        ({"group_size": True}, "multiple of 16"),
        ({"max_error": 0}, "positive number"),
    ],
)
def test_bad_options_are_errors_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(gw.InputError, match=message):
        gw.QuantizeEmbeddings(**options)
