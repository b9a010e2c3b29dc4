"""Linears that have adapters beside them are stacked like others, and the adapters are added to their parts."""

from __future__ import annotations

import pytest
import torch
from tests.passes.adapters.cases import stirred
from torch import nn
from torch.nn import functional

import graphwright as gw
from graphwright.ir.arguments import argument

WIDTH, HEADS = 16, 4
X = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(3))


class Layer(nn.Module):
    """Self-attention with grouped queries and a gated block."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.k_proj = nn.Linear(WIDTH, WIDTH // 2, bias=False)
        self.v_proj = nn.Linear(WIDTH, WIDTH // 2, bias=False)
        self.gate_proj = nn.Linear(WIDTH, 24, bias=False)
        self.up_proj = nn.Linear(WIDTH, 24, bias=False)
        self.down_proj = nn.Linear(24, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            each(x).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2)
            for each in (self.q_proj, self.k_proj, self.v_proj)
        )
        attended = functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        x = x + attended.transpose(1, 2).flatten(2)
        out: torch.Tensor = x + self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


def adapted(kind: gw.AdapterKind, where: object) -> gw.Program:
    insert = gw.InsertAdapters(kind, where=where, seed=1)
    return stirred(gw.optimize(Layer(), [insert], example_inputs=X))


def linears(program: gw.Program) -> list[str]:
    """Modules of the base's linears."""
    return [
        gw.path_of(node)
        for node in program.nodes
        if gw.op_name(node).startswith(("aten.linear", "graphwright.linear")) and "adapter" not in gw.tags_of(node)
    ]


FUSED = ["qkv_proj", "gate_up_proj", "down_proj"]


@pytest.mark.parametrize("where", [("q_proj", "v_proj"), "*_proj", ("up_proj", "k_proj")])
@pytest.mark.parametrize("kind", [gw.LoRA(rank=2, alpha=4), gw.KronA((2, 4))])
def test_the_base_is_stacked_and_the_adapters_are_as_they_were(kind: gw.AdapterKind, where: object) -> None:
    program = adapted(kind, where)
    fused = gw.optimize(program, [gw.Cleanup(), gw.FuseAll()], example_inputs=X)
    assert linears(fused) == FUSED
    assert [row.contract for row in fused.report.rows if row.name == "fuse-qkv"] == ["exact"]
    assert fused.records == program.records
    for name, tensor in gw.adapter_tensors(program, "default").items():
        assert gw.adapter_tensors(fused, "default")[name] is tensor
    bare = gw.optimize(fused, [gw.RemoveAdapters()], example_inputs=X)
    assert linears(bare) == FUSED
    assert torch.allclose(bare(X), Layer()(X), atol=1e-6)


def test_stacked_linears_are_quantised_beside_the_adapters() -> None:
    program = adapted(gw.LoRA(rank=2), ("q_proj", "v_proj"))
    passes = [gw.Cleanup(), gw.FuseAll(), gw.QuantizeLinears(bits=8, group_size=16)]
    small = gw.optimize(program, passes, example_inputs=X)
    assert linears(small) == FUSED
    assert sum(gw.op_name(node) == "graphwright.linear_nbits" for node in small.nodes) == 3
    assert float((small(X) - program(X)).detach().norm() / program(X).detach().norm()) < 0.02


@pytest.mark.parametrize("bits", [None, 8])
def test_merged_into_the_rows_of_the_stacked_weight(bits: int | None) -> None:
    program = adapted(gw.LoRA(rank=2), ("q_proj", "v_proj", "gate_proj"))
    passes: list[gw.Pass] = [gw.Cleanup(), gw.FuseAll()]
    passes += [gw.QuantizeLinears(bits=bits, group_size=16)] if bits else []
    fused = gw.optimize(program, passes, example_inputs=X)
    merged = gw.optimize(fused, [gw.MergeAdapters(requantize=bits is not None)], example_inputs=X)
    assert linears(merged) == FUSED
    assert not any("adapter" in gw.tags_of(node) for node in merged.nodes)
    limit = 1e-5 if bits is None else 0.02
    assert float((merged(X) - program(X)).detach().norm() / program(X).detach().norm()) < limit
    rows = slice(WIDTH, WIDTH + WIDTH // 2)  # of the keys, which have no adapter
    leaf = "weight" if bits is None else "qweight"
    name = next(name for name in fused.tensors() if name.endswith(f"qkv_proj.{leaf}"))
    assert torch.equal(merged.tensor(name)[rows], fused.tensor(name)[rows])
    assert not torch.equal(merged.tensor(name), fused.tensor(name))
    apart = gw.optimize(merged, [gw.UnmergeAdapters(beside=False)], example_inputs=X)
    assert torch.equal(apart.tensor(name), fused.tensor(name))


def test_one_adapter_that_reads_another_input_stops_nothing() -> None:
    """An adapter's own linears are never taken for the base's."""
    program = adapted(gw.LoRA(rank=2), "q_proj")
    fused = gw.optimize(program, [gw.FuseAll()], example_inputs=X)
    qkv = next(node for node in fused.nodes if gw.path_of(node) == "qkv_proj")
    assert argument(qkv, "weight").meta["val"].shape == (WIDTH * 2, WIDTH)
