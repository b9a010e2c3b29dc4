"""``QuantizeAttention``: fused attention in bytes, and why other attention is left alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import graphwright as gw
from graphwright.backends.cpu import CpuBackend, native_status
from graphwright.ir import ops
from graphwright.ir.provenance import add_tags

Listing = Callable[[gw.Program], list[str]]


class Attention(nn.Module):
    """Two heads' attention over rows of 16 features, with a padding mask."""

    def __init__(self, causal: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.out, self.causal = nn.Linear(16, 48), nn.Linear(16, 16), causal

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = self.qkv(x).view(x.shape[0], x.shape[1], 3, 2, 8).permute(2, 0, 3, 1, 4)
        found = functional.scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=self.causal)
        y: torch.Tensor = self.out(found.transpose(1, 2).reshape(x.shape))
        return y


X = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(1))


def fused(causal: bool = False) -> gw.Program:
    program = gw.trace(Attention(causal), X)
    assert gw.FuseAttention()(program)
    return program


def reasons(program: gw.Program, item: gw.Pass) -> list[str]:
    return [refusal.reason for refusal in item.refusals(program)]


def test_before_and_after(listing: Listing) -> None:
    program = fused()
    before = [line for line in listing(program) if "attention" in line]
    wanted = program(X)
    assert gw.QuantizeAttention()(program) is True
    (after,) = [line for line in listing(program) if "= graphwright.attention" in line]
    assert after == before[0].replace("%attention =", "%attention_int8 =").replace(".attention(", ".attention_int8(")
    with torch.no_grad():
        assert 0 < (program(X) - wanted).norm() / wanted.norm() < 0.02
    gw.verify(program)
    assert gw.QuantizeAttention()(program) is False


@pytest.mark.parametrize("causal", [True, False])
def test_the_pipeline_holds_it_to_its_limit(causal: bool) -> None:
    passes = [gw.FuseAttention(), gw.QuantizeAttention(), gw.QuantizeLinears(activations="int8")]
    done = gw.optimize(gw.trace(Attention(causal), X), passes, example_inputs=(X,))
    kinds = {gw.op_name(node) for node in done.nodes if node.op == "call_function"}
    assert kinds >= {"graphwright.attention_int8", "graphwright.linear_int8_dynamic"}
    strict = gw.QuantizeAttention(max_error=1e-6)
    with pytest.raises(gw.ContractViolation):
        gw.optimize(gw.trace(Attention(causal), X), [gw.FuseAttention(), strict], example_inputs=(X,))


def test_what_it_leaves_alone() -> None:
    plain = gw.trace(Attention(), X)
    assert gw.QuantizeAttention()(plain) is False
    assert reasons(plain, gw.QuantizeAttention()) == ["it is not fused: put fuse-attention before this pass"]
    program = fused()
    assert reasons(program, gw.QuantizeAttention(ignore="*")) == ["not selected by where= / ignore="]
    add_tags(next(node for node in program.nodes if node.name == "attention"), ["adapter"])
    assert reasons(program, gw.QuantizeAttention()) == ["it is tagged adapter, which this pass leaves alone"]


class Step(nn.Module):
    def forward(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, starts: torch.Tensor) -> Any:
        slots = torch.arange(2)
        return ops.get("cached_attention").target(query, keys, values, slots, starts, None, 0.3, 0, 0.0)


def test_a_decoding_step_is_a_session_s_business() -> None:
    cache = torch.randn(2, 2, 9, 8)
    program = gw.trace(Step(), (torch.randn(2, 4, 1, 8), cache, cache, torch.tensor([3, 5])))
    (reason,) = reasons(program, gw.QuantizeAttention())
    assert reason == "it reads a decoder's cache, which a session stores in INT8 by itself: cache='int8'"


def test_order_and_round_trip(tmp_path: Path) -> None:
    with pytest.raises(gw.OrderError, match="'quantize-attention' must come after 'fuse-attention'"):
        gw.optimize(gw.trace(Attention(), X), [gw.QuantizeAttention(), gw.FuseAttention()], example_inputs=(X,))
    program = fused()
    gw.QuantizeAttention()(program)
    program.save(tmp_path / "model")
    assert torch.equal(gw.Program.load(tmp_path / "model")(X), program(X))
    with pytest.raises(gw.ExportError, match="the operator graphwright.attention_int8 has no ONNX translation"):
        gw.export_onnx(program, tmp_path / "model.onnx", example_inputs=(X,))


@pytest.mark.skipif(not native_status().available, reason=native_status().message)
def test_explain_says_that_it_has_no_kernel() -> None:
    done = gw.optimize(
        gw.trace(Attention(), X), [gw.FuseAttention(), gw.QuantizeAttention()], example_inputs=(X,), target=CpuBackend()
    )
    (use,) = [use for use in done.explain() if "attention" in use.op]
    assert use.kernel == "reference"
    assert use.reason == "the attention kernels round keys and values to INT8, not queries and probabilities"
