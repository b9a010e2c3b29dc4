"""Adapters at embeddings, convolutions and weights stored [in, out]."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.passes.adapters.cases import stirred
from torch import nn

import graphwright as gw

IDS = torch.tensor([[3, 0, 6, 6, 1, 12], [2, 9, 9, 4, 11, 5]])


class Net(nn.Module):
    """An embedding, convolutions over one and two dimensions, one of them in groups, and an addmm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(13, 8)
        self.flat = nn.Conv1d(8, 12, 3, padding=2, dilation=2)
        self.wide = nn.Conv2d(1, 4, (3, 2), stride=(2, 1), padding=(1, 0), bias=False)
        self.grouped = nn.Conv2d(4, 8, 3, padding=1, groups=2)
        self.weight = nn.Parameter(torch.randn(8, 6))
        self.bias = nn.Parameter(torch.randn(6))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.flat(self.table(ids).transpose(1, 2)))
        x = torch.tanh(self.grouped(torch.tanh(self.wide(x.unsqueeze(1)))))
        rows = x.mean((2, 3))
        return torch.addmm(self.bias, rows, self.weight)


CASES: dict[str, tuple[gw.AdapterKind, str, int]] = {
    "lora-embedding": (gw.LoRA(rank=3, alpha=6, ops=("embedding",)), "table", 3 * (13 + 8)),
    "lora-conv1d": (gw.LoRA(rank=3, alpha=6, ops=("conv",)), "flat", 3 * (8 * 3 + 12)),
    "lora-conv2d": (gw.LoRA(rank=1, alpha=2, ops=("linear", "conv")), "wide", 6 + 4),
    "lora-fa-conv": (gw.LoRAFA(rank=2, ops=("conv",)), "flat", 2 * 12),
    "lora-conv-bias": (gw.LoRA(rank=2, alpha=3, bias=True, ops=("conv",)), "flat", 2 * (24 + 12) + 12),
    "dora-embedding": (gw.DoRA(rank=3, alpha=6, ops=("embedding",)), "table", 3 * (13 + 8) + 8),
    "dora-conv1d": (gw.DoRA(rank=3, ops=("conv",)), "flat", 3 * (8 * 3 + 12) + 12),
    "dora-conv2d": (gw.DoRA(rank=1, ops=("conv",)), "wide", 6 + 4 + 4),
    "lokr-conv1d": (gw.LoKr(rank=1, alpha=3, ops=("conv",)), "flat", 3 * 2 + 4 + 4 * 3),
    "lokr-conv2d": (gw.LoKr(rank=9, ops=("conv",)), "wide", 2 * 1 + 2 * 1 * 6),
    "lokr-groups": (gw.LoKr(rank=9, ops=("conv",)), "grouped", 2 * 1 + 4 * 2 * 9),
    "loha-conv1d": (gw.LoHa(rank=2, alpha=3, ops=("conv",)), "flat", 2 * 2 * (12 + 24)),
    "loha-groups": (gw.LoHa(rank=2, ops=("conv",)), "grouped", 2 * 2 * (8 + 18)),
    "ia3-conv1d": (gw.IA3(ops=("conv",)), "flat", 12),
    "ia3-conv2d": (gw.IA3(ops=("conv",)), "grouped", 8),
    "ia3-conv-input": (gw.IA3(side="input", ops=("conv",)), "grouped", 4),
}


def put_in(kind: gw.AdapterKind | Path, **options: Any) -> gw.OptimizedModel:
    return gw.optimize(Net(), [gw.InsertAdapters(kind, **options)], example_inputs=IDS)


@pytest.mark.parametrize("name", sorted(CASES))
def test_inserted_saved_merged_removed(name: str, tmp_path: Path) -> None:
    kind, where, count = CASES[name]
    program, bare = put_in(kind, where=where), Net()(IDS)
    assert program.report.rows[0].contract == "exact"
    assert program.report.rows[0].notes["trained_parameters"] == count
    assert torch.allclose(program(IDS), bare, atol=1e-6)
    stirred(program)
    wanted = program(IDS)
    assert (wanted - bare).norm() > 1e-3 * bare.norm()
    wanted.square().sum().backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for p in program.parameters() if p.requires_grad)
    gw.save_adapter(program, tmp_path)
    assert torch.equal(put_in(tmp_path)(IDS), wanted)
    merged = gw.optimize(program, [gw.MergeAdapters()], example_inputs=IDS)
    assert (merged(IDS) - wanted).norm() <= 2e-6 * wanted.norm()
    assert [gw.op_name(n) for n in merged.nodes] == [gw.op_name(n) for n in gw.trace(Net(), IDS).nodes]
    assert torch.equal(gw.optimize(program, [gw.RemoveAdapters()], example_inputs=IDS)(IDS), bare)


LINEARS: list[gw.AdapterKind] = [
    gw.LoRA(rank=2),
    gw.LoRAXS(rank=2, std=0),
    gw.DoRA(rank=2),
    gw.VeRA(rank=4),
    gw.NOLA(bases=3, rank=2),
    gw.SoRA(rank=2),
    gw.LoKr(rank=1),
    gw.LoHa(rank=2),
    gw.KronA(),
    gw.IA3(),
    gw.IA3(side="input"),
    gw.OFT(block=4),
    gw.ETHER(blocks=2),
    gw.ETHERPlus(blocks=2),
]


@pytest.mark.parametrize("kind", LINEARS, ids=lambda kind: kind.kind)
def test_weights_stored_the_other_way(kind: gw.AdapterKind) -> None:
    program = stirred(put_in(kind))
    wanted = program(IDS)
    merged = gw.optimize(program, [gw.MergeAdapters()], example_inputs=IDS)
    assert (merged(IDS) - wanted).norm() <= 2e-6 * wanted.norm()
    assert merged.tensor("weight").shape == (8, 6)
    assert not torch.equal(merged.tensor("weight"), Net().weight)


@pytest.mark.parametrize(
    ("kind", "where", "said"),
    [
        (gw.LoRA(rank=2), "table", r"embedding layers are not among the ops=\('linear',\) of lora"),
        (gw.LoRA(rank=2, ops=("conv",)), "grouped", "2 groups has no product of two thin ones"),
        (gw.LoRAFA(rank=2, ops=("embedding",)), "table", "starts at 0 and would stay there"),
    ],
)
def test_where_it_does_not_fire(kind: gw.AdapterKind, where: str, said: str) -> None:
    with pytest.raises(gw.SelectionError, match=said):
        put_in(kind, where=where)


def test_ops_are_checked() -> None:
    with pytest.raises(gw.InputError, match="some of linear, conv, not"):
        gw.LoKr(ops=("embedding",))
    with pytest.raises(gw.InputError, match="some of linear, embedding, conv"):
        gw.LoRA(ops=())


class Tied(nn.Module):
    """A table that is the head too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(13, 8)
        self.head = nn.Linear(8, 13, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.head(torch.tanh(self.table(ids)))
        return y


@pytest.mark.parametrize(("where", "other"), [("table", "linear"), ("head", "embedding")])
def test_tied_weights_are_not_merged(where: str, other: str) -> None:
    kind = gw.LoRA(rank=2, ops=("linear", "embedding"))
    program = stirred(gw.optimize(Tied(), [gw.InsertAdapters(kind, where=where)], example_inputs=IDS))
    before = program(IDS)
    with pytest.raises(gw.InputError, match=f"the weight is also read by %{other}"):
        gw.MergeAdapters()(program)
    assert torch.equal(program(IDS), before)


def test_packed_embeddings_keep_one_beside_them() -> None:
    kind = gw.LoRA(rank=2, ops=("embedding",))
    passes = [gw.QuantizeEmbeddings(bits=8), gw.InsertAdapters(kind, where="table")]
    program = stirred(gw.optimize(Net(), passes, example_inputs=IDS))
    assert program.report.rows[-1].notes["sites"] == 1
    program(IDS).sum().backward()
    assert all(p.grad is not None for p in program.parameters() if p.requires_grad)
    with pytest.raises(gw.InputError, match="packed"):
        gw.MergeAdapters()(program)
