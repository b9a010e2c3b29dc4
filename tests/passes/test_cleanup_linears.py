"""CanonicalizeLinears: every spelling of ``x Wᵀ + b`` becomes ``aten.linear``; what is something else stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import graphwright as gw

X = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(0))


class Spelled(nn.Module):
    """A function of ``x`` and a linear's weights."""

    def __init__(self, function: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.function = function
        self.w = nn.Parameter(torch.randn(16, 24, generator=generator))
        self.stored = nn.Parameter(torch.randn(24, 16, generator=generator))
        self.square = nn.Parameter(torch.randn(24, 24, generator=generator))
        self.b = nn.Parameter(torch.randn(16, generator=generator))
        self.one = nn.Parameter(torch.randn(1, generator=generator))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self, x)


def operators(program: gw.Program) -> list[str]:
    return [gw.op_name(node) for node in program.nodes if node.op == "call_function"]


SPELLINGS: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "T": lambda m, x: x @ m.w.T,
    "t": lambda m, x: x @ m.w.t(),
    "mT": lambda m, x: x @ m.w.mT,
    "transpose": lambda m, x: torch.matmul(x, m.w.transpose(-1, -2)),
    "permute": lambda m, x: torch.matmul(x, m.w.permute(1, 0)),
    "mm": lambda m, x: torch.mm(x[0], m.w.t()),
    "one row": lambda m, x: torch.matmul(x[0, 0], m.w.t()),
    "bias": lambda m, x: x @ m.w.T + m.b,
    "bias first": lambda m, x: m.b + x @ m.w.T,
    "addmm": lambda m, x: torch.addmm(m.b, x[0], m.w.t()),
    "linear without bias": lambda m, x: nn.functional.linear(x, m.w) + m.b,
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings_become_linears(name: str) -> None:
    model = Spelled(SPELLINGS[name])
    small = gw.optimize(model, [gw.CanonicalizeLinears(), gw.RemoveDeadCode()], example_inputs=X)
    found = [op for op in operators(small) if op not in ("aten.select.int",)]
    assert found == ["aten.linear"]
    torch.testing.assert_close(small(X), model(X), rtol=1e-5, atol=1e-5)


STAYS: dict[str, tuple[Callable[[Any, torch.Tensor], torch.Tensor], str]] = {
    "stored the other way": (lambda m, x: x @ m.stored, ""),
    "computed weight": (lambda m, x: x @ (m.w * 2).T, "computed by %mul"),
    "not transposed": (lambda m, x: x @ m.square.permute(0, 1), ""),
    "factors": (lambda m, x: torch.addmm(m.b, x[0], m.w.t(), alpha=2), "factors other than 1"),
    "addmm of more than a bias": (lambda m, x: torch.addmm(x[0, :, :16], x[0], m.w.t()), "a bias would be [16]"),
    "product of activations": (lambda m, x: x @ x.mT, ""),
}


@pytest.mark.parametrize("name", STAYS)
def test_other_products_stay(name: str) -> None:
    function, reason = STAYS[name]
    program = gw.trace(Spelled(function), X)
    item = gw.CanonicalizeLinears()
    reasons = [refusal.reason for refusal in item.refusals(program)]
    assert any(reason in text for text in reasons) if reason else not reasons
    assert not item(program)
    assert "aten.linear" not in operators(program)


BIASES: dict[str, tuple[Callable[[Any, torch.Tensor], torch.Tensor], str]] = {
    "broadcast": (lambda m, x: x @ m.w.T + m.one, "a bias would be [16]"),
    "factor": (lambda m, x: torch.add(x @ m.w.T, m.b, alpha=2), "the sum has a factor"),
    "used without": (lambda m, x: (y := x @ m.w.T) * (y + m.b), "used without the bias too"),
    "wider": (lambda m, x: x @ m.w.T + m.b.double(), ""),
}


@pytest.mark.parametrize("name", BIASES)
def test_sums_that_are_no_bias_stay(name: str) -> None:
    function, reason = BIASES[name]
    model = Spelled(function)
    program = gw.trace(model, X)
    item = gw.CanonicalizeLinears()
    assert item(program)
    assert "aten.linear" in operators(program)
    assert "aten.add.Tensor" in operators(program)
    reasons = [refusal.reason for refusal in item.refusals(program)]
    assert any(reason in text for text in reasons) if reason else not reasons
    torch.testing.assert_close(program(X), model(X), rtol=1e-5, atol=1e-5)


def test_a_shared_weight_stays_one() -> None:
    model = Spelled(lambda m, x: (x @ m.w.T) @ m.w)
    program = gw.trace(model, X)
    assert gw.Cleanup()(program)
    assert operators(program) == ["aten.linear", "aten.matmul"]
    assert set(program.tensors()) == {"w"}


def test_what_is_spelled_out_is_quantised() -> None:
    model = Spelled(lambda m, x: x @ m.w.T + m.b)
    small = gw.optimize(model, [gw.Cleanup(), gw.QuantizeLinears(bits=8, group_size=16)], example_inputs=X)
    assert operators(small) == ["graphwright.linear_nbits"]
    assert set(small.tensors()) == {"w_qweight", "w_scales", "b"}


STORED: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "addmm": lambda m, x: torch.addmm(m.b, x[0], m.stored),
    "mm": lambda m, x: torch.mm(x[0], m.stored),
    "matmul": lambda m, x: x @ m.stored,
}


@pytest.mark.parametrize("name", STORED)
def test_weights_stored_the_other_way_are_transposed(name: str) -> None:
    model = Spelled(STORED[name])
    small = gw.optimize(model, [gw.TransposeLinears()], example_inputs=X)
    assert operators(small)[-1] == "aten.linear"
    assert torch.equal(small.tensor("stored_transposed"), model.stored.t())
    assert isinstance(small.tensor("stored_transposed"), nn.Parameter)
    assert "stored" not in small.tensors()
    torch.testing.assert_close(small(X), model(X), rtol=1e-5, atol=1e-5)
    assert not gw.TransposeLinears()(small)


NOT_TRANSPOSED: dict[str, tuple[Callable[[Any, torch.Tensor], torch.Tensor], str]] = {
    "computed": (lambda m, x: x @ (m.stored * 2), ""),
    "used twice": (lambda m, x: x @ m.stored + m.stored.sum(), "also read by"),
    "factors": (lambda m, x: torch.addmm(m.b, x[0], m.stored, beta=2), "factors other than 1"),
    "addmm of more than a bias": (lambda m, x: torch.addmm(x[0, :, :16], x[0], m.stored), "a bias would be [16]"),
    "a vector": (lambda m, x: x[..., :16] @ m.b, "not a matrix"),
}


@pytest.mark.parametrize("name", NOT_TRANSPOSED)
def test_other_stored_products_stay(name: str) -> None:
    function, reason = NOT_TRANSPOSED[name]
    program = gw.trace(Spelled(function), X)
    item = gw.TransposeLinears()
    reasons = [refusal.reason for refusal in item.refusals(program)]
    assert any(reason in text for text in reasons) if reason else not reasons
    assert not item(program)


def test_tied_weights_are_not_transposed() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Parameter(torch.randn(24, 16))
            self.second = self.first

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.second

    program = gw.trace(Tied(), X)
    item = gw.TransposeLinears()
    assert [refusal.reason for refusal in item.refusals(program)] == ["first is tied to a weight of another name"]
    assert not item(program)
