"""GELU: both forms, however their factors are ordered; nothing that only looks like it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import graphwright as gw
from graphwright.passes.fusion import FuseGelu

Function = Callable[[torch.Tensor], Any]
C = math.sqrt(2 / math.pi)
X = torch.cat([torch.linspace(-6, 6, 37), torch.tensor([0.0, -0.0, 1e-30, 40.0, -40.0])]).reshape(2, 3, 7)


class Applied(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(x)


def traced(function: Function, dtype: torch.dtype = torch.float32) -> gw.Program:
    return gw.trace(Applied(function), X.to(dtype))


def operators(program: gw.Program) -> list[str]:
    return [gw.op_name(node) for node in program.nodes if node.op == "call_function"]


def reasons(program: gw.Program) -> str:
    return "\n".join(map(str, FuseGelu().refusals(program)))


EXACT: dict[str, Function] = {
    "bert": lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))),
    "half first": lambda x: 0.5 * x * (1 + torch.erf(x * math.sqrt(0.5))),
    "cdf": lambda x: x * (0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))),
    "sum first": lambda x: (torch.erf(x / 2**0.5) + 1) * x / 2,
    "half last": lambda x: x * (1 + torch.erf(x / math.sqrt(2.0))) * 0.5,
    "distributed": lambda x: 0.5 * x + 0.5 * x * torch.erf(x / math.sqrt(2.0)),
    "subtracted": lambda x: 0.5 * x * (torch.erf(x / math.sqrt(2.0)) - (-1)),
    "rounded constants": lambda x: x * 0.5 * (1.0 + torch.erf(x * 0.7071067690849304)),
}
TANH: dict[str, Function] = {
    "gpt2": lambda x: 0.5 * x * (1.0 + torch.tanh(C * (x + 0.044715 * torch.pow(x, 3.0)))),
    "products": lambda x: 0.5 * x * (1.0 + torch.tanh(C * (x + 0.044715 * x * x * x))),
    "factored": lambda x: 0.5 * x * (1.0 + torch.tanh(x * C * (1.0 + 0.044715 * x * x))),
    "literal": lambda x: 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x))),
    "cube first": lambda x: (torch.tanh((0.044715 * x**3 + x) * C) + 1) * (x * 0.5),
    "distributed": lambda x: 0.5 * x + 0.5 * x * torch.tanh(C * x + C * 0.044715 * x**3),
}
CASES = [("none", name, EXACT[name]) for name in EXACT] + [("tanh", name, TANH[name]) for name in TANH]


@pytest.mark.parametrize(
    ("approximate", "name", "function"), CASES, ids=lambda item: item if isinstance(item, str) else ""
)
def test_every_spelling(approximate: str, name: str, function: Function) -> None:
    for dtype in (torch.float64, torch.float32):
        program = traced(function, dtype)
        before = program.clone()
        assert FuseGelu()(program)
        (node,) = [node for node in program.nodes if node.op == "call_function"]
        assert gw.op_name(node) == "aten.gelu"
        assert node.kwargs.get("approximate", "none") == approximate
        loose = name in ("rounded constants", "literal")
        tolerance = 1e-12 if dtype == torch.float64 and not loose else 1e-6
        torch.testing.assert_close(program(X.to(dtype)), before(X.to(dtype)), rtol=tolerance, atol=tolerance)
        assert not FuseGelu()(program)


@given(order=st.permutations([0, 1, 2]), nested=st.booleans(), swap=st.booleans(), divide=st.booleans())
@settings(max_examples=12)
def test_any_order_of_the_factors(order: list[int], nested: bool, swap: bool, divide: bool) -> None:
    def function(x: torch.Tensor) -> Any:
        scaled = x / math.sqrt(2.0) if divide else math.sqrt(0.5) * x
        erf = torch.erf(scaled)
        factors: list[Any] = [x, 0.5, 1 + erf if swap else erf + 1]
        first, second, third = (factors[index] for index in order)
        return first * (second * third) if nested else first * second * third

    program = traced(function, torch.float64)
    before = program.clone()
    assert FuseGelu()(program)
    assert operators(program) == ["aten.gelu"]
    torch.testing.assert_close(program(X.double()), before(X.double()), rtol=1e-12, atol=1e-12)


def test_text(listing: Callable[[gw.Program], list[str]]) -> None:
    program = traced(EXACT["bert"])
    assert listing(program) == [
        "%mul = aten.mul.Tensor(%x, 0.5)",
        "%div = aten.div.Tensor(%x, 1.4142135623730951)",
        "%erf = aten.erf(%div)",
        "%add = aten.add.Tensor(%erf, 1.0)",
        "%mul_1 = aten.mul.Tensor(%mul, %add)",
    ]
    FuseGelu()(program)
    (line,) = listing(program)
    assert line.endswith("= aten.gelu(%x)")
    program = traced(TANH["gpt2"])
    FuseGelu()(program)
    (line,) = listing(program)
    assert line.endswith("= aten.gelu(%x, approximate='tanh')")


def test_the_operand_may_itself_be_arithmetic() -> None:
    """x is the sum, though the sum could be expanded too."""

    def function(x: torch.Tensor) -> torch.Tensor:
        shifted = x * 3.0 + 0.25
        return 0.5 * shifted * (1.0 + torch.erf(shifted / math.sqrt(2.0)))

    program = traced(function, torch.float64)
    before = program.clone()
    assert FuseGelu()(program)
    assert operators(program) == ["aten.mul.Tensor", "aten.add.Tensor", "aten.gelu"]
    torch.testing.assert_close(program(X.double()), before(X.double()), rtol=1e-12, atol=1e-12)


def test_a_scaled_gelu_is_found_inside() -> None:
    program = traced(lambda x: 2.0 * (0.5 * x * (1.0 + torch.erf(x / math.sqrt(2.0)))))
    assert FuseGelu()(program)
    assert operators(program) == ["aten.gelu", "aten.mul.Tensor"]


REFUSED: dict[str, tuple[Function, str]] = {
    "quick gelu": (lambda x: x * torch.sigmoid(1.702 * x), "x·sigmoid(1.702·x) is quick GELU"),
    "wrong root": (lambda x: 0.5 * x * (1 + torch.erf(x / 2.0)), "aten.erf is taken of 0.5·x"),
    "sloppy root": (lambda x: 0.5 * x * (1 + torch.erf(x / 1.4142)), "not of x/√2"),
    "no scale": (lambda x: 0.5 * x * (1 + torch.erf(x)), "aten.erf is taken of 1·x"),
    "wrong half": (lambda x: 0.6 * x * (1 + torch.erf(x / math.sqrt(2.0))), "the result is 0.6·x + 0.6·x·erf(…)"),
    "wrong one": (lambda x: 0.5 * x * (1.5 + torch.erf(x / math.sqrt(2.0))), "the result is 0.75·x + 0.5·x·erf(…)"),
    "minus": (lambda x: 0.5 * x * (1 - torch.erf(x / math.sqrt(2.0))), "-0.5·x·erf(…)"),
    "wrong cube": (
        lambda x: 0.5 * x * (1.0 + torch.tanh(C * (x + 0.044 * x**3))),
        "not of √(2/π)·(x + 0.044715·x³)",
    ),
    "square": (lambda x: 0.5 * x * (1.0 + torch.tanh(C * (x + 0.044715 * x**2))), "0.03567741·x^2"),
    "tanh as erf": (lambda x: 0.5 * x * (1 + torch.tanh(x / math.sqrt(2.0))), "aten.tanh is taken of"),
    "erf as tanh": (lambda x: 0.5 * x * (1.0 + torch.erf(C * (x + 0.044715 * x**3))), "aten.erf is taken of"),
    "erf used elsewhere": (
        lambda x: (0.5 * x * (1.0 + torch.erf(x / math.sqrt(2.0))), torch.erf(x / math.sqrt(2.0))),
        "is also used by",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name: str) -> None:
    function, reason = REFUSED[name]
    program = traced(function)
    gw.EliminateCommonSubexpressions()(program)
    assert not FuseGelu()(program)
    assert reason in reasons(program)


def test_refuses_another_operand() -> None:
    """erf of one value times another is a gate, not a GELU."""

    class TwoInputs(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return 0.5 * y * (1.0 + torch.erf(x / math.sqrt(2.0)))

    program = gw.trace(TwoInputs(), (X, X + 1))
    assert not FuseGelu()(program)
    assert "gelu" not in " ".join(operators(program))


def test_refuses_a_broadcast_or_widened_operand() -> None:
    """The polynomial is that of a GELU, but an operand of another dtype makes the result's type another."""
    program = traced(lambda x: 0.5 * x.double() * (1.0 + torch.erf(x / math.sqrt(2.0))))
    assert not FuseGelu()(program)


@pytest.mark.parametrize("value", [3.0, -3.0, 0.5])
def test_constants_of_all_kinds_of_functions_stay(value: float) -> None:
    """No other product with erf or tanh is touched."""
    functions: list[Function] = [torch.erf, torch.tanh, torch.sigmoid]
    for outer, inner in itertools.product(functions, functions):
        program = traced(lambda x, outer=outer, inner=inner: outer(value * x) * inner(x))  # type: ignore[misc]
        assert not FuseGelu()(program)
