"""Gated activations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import graphwright as gw
from graphwright.passes.fusion import FuseGatedActivation, FuseGelu

Function = Callable[[torch.Tensor, torch.Tensor], Any]


class Applied(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, gate: torch.Tensor, up: torch.Tensor) -> Any:
        return self.function(gate, up)


def traced(function: Function, dtype: torch.dtype = torch.float32) -> tuple[gw.Program, tuple[torch.Tensor, ...]]:
    inputs = (torch.randn(2, 5, 8).to(dtype) * 3, torch.randn(2, 5, 8).to(dtype))
    return gw.trace(Applied(function), inputs), inputs


def operators(program: gw.Program) -> list[str]:
    return [gw.op_name(node) for node in program.nodes if node.op == "call_function"]


FUSED: dict[str, tuple[Function, str]] = {
    "silu": (lambda gate, up: functional.silu(gate) * up, "silu"),
    "silu on the right": (lambda gate, up: up * functional.silu(gate), "silu"),
    "swish": (lambda gate, up: gate * torch.sigmoid(gate) * up, "silu"),
    "swish on the right": (lambda gate, up: up * (torch.sigmoid(gate) * gate), "silu"),
    "gelu": (lambda gate, up: functional.gelu(gate) * up, "gelu"),
    "gelu tanh": (lambda gate, up: up * functional.gelu(gate, approximate="tanh"), "gelu_tanh"),
    "relu": (lambda gate, up: functional.relu(gate) * up, "relu"),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FUSED)
def test_every_spelling(name: str, dtype: torch.dtype) -> None:
    function, activation = FUSED[name]
    program, inputs = traced(function, dtype)
    before = program.clone()
    assert FuseGatedActivation()(program)
    (node,) = [node for node in program.nodes if node.op == "call_function"]
    assert gw.op_name(node) == "graphwright.gated_activation"
    assert [item.name for item in node.args[:2]] == ["gate", "up"]
    assert node.args[2] == activation
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(program(*inputs), before(*inputs), rtol=4 * step, atol=4 * step)
    assert not FuseGatedActivation()(program)


def test_text(listing: Callable[[gw.Program], list[str]]) -> None:
    program, _ = traced(FUSED["silu"][0])
    assert listing(program) == ["%silu = aten.silu(%gate)", "%mul = aten.mul.Tensor(%silu, %up)"]
    FuseGatedActivation()(program)
    (line,) = listing(program)
    assert line.endswith("= graphwright.gated_activation(%gate, %up, 'silu')")


def test_one_linear_for_gate_and_up() -> None:
    """As in Phi-3: the linear makes both, a split takes them apart."""

    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up = nn.Linear(8, 24, bias=False)

        def forward(self, x: torch.Tensor) -> Any:
            gate, up = self.gate_up(x).chunk(2, dim=-1)
            return up * functional.silu(gate)

    x = torch.randn(2, 3, 8)
    program = gw.trace(Mlp(), x)
    before = program.clone()
    assert FuseGatedActivation()(program)
    assert operators(program) == [
        "aten.linear",
        "aten.chunk",
        "py.getitem",
        "py.getitem",
        "graphwright.gated_activation",
    ]
    torch.testing.assert_close(program(x), before(x), rtol=1e-6, atol=1e-6)


def test_a_spelled_out_gelu_is_fused_first() -> None:
    program, inputs = traced(lambda gate, up: 0.5 * gate * (1 + torch.erf(gate / 2**0.5)) * up, torch.float64)
    before = program.clone()
    assert not FuseGatedActivation()(program)
    assert FuseGelu()(program)
    assert FuseGatedActivation()(program)
    assert operators(program) == ["graphwright.gated_activation"]
    torch.testing.assert_close(program(*inputs), before(*inputs), rtol=1e-12, atol=1e-12)
    with pytest.raises(gw.OrderError, match="fuse-gelu"):
        gw.run_passes(before, [FuseGatedActivation(), FuseGelu()])


REFUSED: dict[str, tuple[Function, str]] = {
    "broadcast": (lambda gate, up: functional.silu(gate[:, :1]) * up, "the other factor"),
    "number per row": (lambda gate, up: functional.relu(gate) * up.sum(-1, keepdim=True), "the other factor"),
    "dtype": (lambda gate, up: functional.silu(gate) * up.double(), "the other factor"),
    "activation used elsewhere": (
        lambda gate, up: (functional.silu(gate) * up, functional.silu(gate)),
        "is also used by",
    ),
    "squared": (lambda gate, up: functional.relu(gate) * functional.relu(gate), "multiplied by itself"),
    "sigmoid": (lambda gate, up: torch.sigmoid(gate) * up, "aten.sigmoid is none of the operator's activations"),
    "tanh": (lambda gate, up: torch.tanh(gate) * up, "aten.tanh is none of the operator's activations"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name: str) -> None:
    function, reason = REFUSED[name]
    program, _ = traced(function)
    gw.EliminateCommonSubexpressions()(program)
    before = program.clone()
    assert not FuseGatedActivation()(program)
    assert reason in "\n".join(map(str, FuseGatedActivation().refusals(before)))


def test_a_swish_alone_is_no_gate() -> None:
    program, _ = traced(lambda gate, up: gate * torch.sigmoid(gate) + up)
    assert not FuseGatedActivation()(program)
    assert FuseGatedActivation().refusals(program) == ()
