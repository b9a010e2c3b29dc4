"""RemoveDeadCode and EliminateCommonSubexpressions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import graphwright as gw
from graphwright.ir.provenance import add_tags

Listing = Callable[[gw.Program], list[str]]


class Applied(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(x)


def traced(function: Callable[..., Any], x: torch.Tensor | None = None, **options: Any) -> gw.Program:
    return gw.trace(Applied(function), torch.randn(2, 5, 8) if x is None else x, **options)


def operators(program: gw.Program) -> list[str]:
    return [gw.op_name(node) for node in program.nodes if node.op == "call_function"]


def reasons(item: gw.Pass, program: gw.Program) -> str:
    return "\n".join(map(str, item.refusals(program)))


# -- dead code ---------------------------------------------------------------------------------------------------------


def unused_chain(x: torch.Tensor) -> torch.Tensor:
    (x.exp() + 1).to(torch.float64).sum()
    return x.relu()


def test_dead_code_text(listing: Listing) -> None:
    program = traced(unused_chain)
    assert len(listing(program)) == 6
    before = program.clone()
    assert gw.RemoveDeadCode()(program)
    assert listing(program) == ["%relu = aten.relu(%x)"]
    x = torch.randn(3, 4, 8)
    assert torch.equal(program(x), before(x))
    assert not gw.RemoveDeadCode()(program)


def test_assertions_are_dead_code() -> None:
    program = traced(lambda x: x.double())
    assert operators(program) == ["aten._assert_tensor_metadata", "aten.to.dtype"]
    assert gw.RemoveDeadCode()(program)
    assert operators(program) == ["aten.to.dtype"]


def test_unused_weights_go() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.unused(x)
            result: torch.Tensor = self.used(x)
            return result

    program = gw.trace(Model(), torch.randn(2, 8))
    assert set(program.tensors()) == {"used.weight", "used.bias", "unused.weight", "unused.bias"}
    assert gw.RemoveDeadCode()(program)
    assert set(program.tensors()) == {"used.weight", "used.bias"}
    assert not gw.RemoveDeadCode()(program)


def test_a_weight_no_node_reads_goes() -> None:
    program = traced(torch.relu)
    program.set_tensor("left.over", torch.ones(3))
    assert gw.RemoveDeadCode()(program)
    assert program.tensors() == {}
    assert not gw.RemoveDeadCode()(program)


def test_inputs_stay() -> None:
    class Model(nn.Module):
        def forward(self, x: torch.Tensor, unused: torch.Tensor) -> torch.Tensor:
            return x + 1

    program = gw.trace(Model(), (torch.randn(2, 3), torch.randn(2, 3)))
    assert not gw.RemoveDeadCode()(program)
    assert [node.name for node in program.inputs] == ["x", "unused"]


def test_dead_random_numbers_stay() -> None:
    """Without the unused draw, the one after it would be another."""

    def function(x: torch.Tensor) -> torch.Tensor:
        torch.rand_like(x).relu()
        return x + torch.rand_like(x)

    program = traced(function)
    before = program.clone()
    gw.RemoveDeadCode()(program)
    assert "draws random numbers" in reasons(gw.RemoveDeadCode(), program)
    x = torch.randn(2, 5, 8)
    torch.manual_seed(7)
    expected = before(x)
    torch.manual_seed(7)
    assert torch.equal(program(x), expected)


def test_dead_effects_stay() -> None:
    program = traced(torch.relu)
    with program.edit() as rewriter:
        rewriter.call("aten._print", "here", like=program.node("relu"))
    assert not gw.RemoveDeadCode()(program)
    assert "may have an effect" in reasons(gw.RemoveDeadCode(), program)


def test_dead_code_respects_where() -> None:
    program = traced(unused_chain)
    assert not gw.RemoveDeadCode(ignore=lambda node: True)(program)


# -- common subexpressions ---------------------------------------------------------------------------------------------


def shared(x: torch.Tensor) -> torch.Tensor:
    return (x.exp() + 1) * (x.exp() + 1)


def test_common_subexpressions_text(listing: Listing) -> None:
    program = traced(shared)
    assert len(listing(program)) == 5
    before = program.clone()
    assert gw.EliminateCommonSubexpressions()(program)
    assert listing(program) == [
        "%exp = aten.exp(%x)",
        "%add = aten.add.Tensor(%exp, 1)",
        "%mul = aten.mul.Tensor(%add, %add)",
    ]
    x = torch.randn(1, 3, 8)
    assert torch.equal(program(x), before(x))
    assert not gw.EliminateCommonSubexpressions()(program)


MERGED: dict[str, tuple[Callable[[torch.Tensor], Any], int]] = {
    "commutative": (lambda x: x * x.exp() - x.exp() * x, 3),
    "several results": (lambda x: x.chunk(2, -1)[0] + x.chunk(2, -1)[0], 3),
    "lists": (lambda x: torch.cat([x, x], 1) + torch.cat([x, x], 1), 2),
    "dropout that is off": (lambda x: functional.dropout(x, 0.5, False) + functional.dropout(x, 0.5, False), 2),
    "attention": (
        lambda x: functional.scaled_dot_product_attention(x, x, x) + functional.scaled_dot_product_attention(x, x, x),
        2,
    ),
    "sizes": (lambda x: x.sum() * x.size(0) * x.exp().size(0), 4),
}


@pytest.mark.parametrize("name", MERGED)
def test_equal_expressions_are_merged(name: str) -> None:
    function, count = MERGED[name]
    program = traced(function)
    gw.RemoveDeadCode()(program)
    before = program.clone()
    gw.EliminateCommonSubexpressions()(program)
    gw.RemoveDeadCode()(program)
    assert len(operators(program)) == count
    for x in (torch.randn(2, 5, 8), torch.randn(1, 2, 8)):
        assert torch.equal(program(x), before(x))


KEPT: dict[str, tuple[Callable[[torch.Tensor], Any], str]] = {
    "dropout": (
        lambda x: functional.dropout(x, 0.5, True) + functional.dropout(x, 0.5, True),
        "gives another value each time",
    ),
    "random": (lambda x: torch.rand_like(x) - torch.rand_like(x), "gives another value each time"),
    "random attention": (
        lambda x: (
            functional.scaled_dot_product_attention(x, x, x, dropout_p=0.5)
            + functional.scaled_dot_product_attention(x, x, x, dropout_p=0.5)
        ),
        "gives another value each time",
    ),
    "uninitialised": (
        lambda x: torch.zeros_like(torch.empty_like(x)) + torch.zeros_like(torch.empty_like(x)),
        "gives another value each time",
    ),
    "order": (lambda x: (x - x.exp()) * (x.exp() - x), ""),
    "matmul": (lambda x: x @ x.mT + (x.mT @ x).sum(), ""),
    "another constant": (lambda x: (x + 1) * (x + 1.0), ""),
    "another axis": (lambda x: x.softmax(1) + x.softmax(2), ""),
    "zeros of two signs": (lambda x: x.clamp_min(0.0) + x.clamp_min(-0.0), ""),
    "scaled sum": (lambda x: torch.add(x, x.exp(), alpha=2) - torch.add(x.exp(), x, alpha=2), ""),
}


@pytest.mark.parametrize("name", KEPT)
def test_different_expressions_stay_apart(name: str) -> None:
    function, reason = KEPT[name]
    program = traced(function)
    gw.Pipeline(passes=(gw.RemoveDeadCode(), gw.RemoveNoOps()))(program)
    before = program.clone()
    gw.EliminateCommonSubexpressions()(program)
    root = program.output.args[0][0]
    assert root.all_input_nodes[0] is not root.all_input_nodes[-1]
    assert reason in reasons(gw.EliminateCommonSubexpressions(), before)
    if not reason:
        x = torch.randn(2, 5, 8)
        assert torch.equal(program(x), before(x))


def test_nodes_of_other_tags_stay_apart() -> None:
    program = traced(lambda x: x.exp() + x.exp())
    first, second = (node for node in program.nodes if gw.op_name(node) == "aten.exp")
    add_tags(second, {"quantized"})
    assert not gw.EliminateCommonSubexpressions()(program)
    add_tags(first, {"quantized"})
    assert gw.EliminateCommonSubexpressions()(program)


def test_adapters_stay_as_they_are() -> None:
    program = traced(lambda x: x.exp() + x.exp())
    for node in program.nodes:
        add_tags(node, {"adapter"})
    assert not gw.EliminateCommonSubexpressions()(program)


def test_common_subexpressions_respect_where() -> None:
    program = traced(shared)
    assert not gw.EliminateCommonSubexpressions(ignore=lambda node: gw.op_name(node) == "aten.exp")(program)
