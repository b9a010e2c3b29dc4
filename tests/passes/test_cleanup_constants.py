"""FoldConstants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import graphwright as gw
from graphwright.ir.provenance import add_tags

Listing = Callable[[gw.Program], list[str]]


class Applied(nn.Module):
    """A function of x and a constant table, a frozen parameter and a trainable one."""

    table: torch.Tensor

    def __init__(self, function: Callable[..., Any], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(8, 4).to(dtype))
        self.frozen = nn.Parameter(torch.randn(4, dtype=dtype), requires_grad=False)
        self.trained = nn.Parameter(torch.randn(4, dtype=dtype))
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self, x)


def traced(function: Callable[..., Any], dtype: torch.dtype = torch.float32) -> gw.Program:
    program = gw.trace(Applied(function, dtype), torch.randn(2, 5, 4).to(dtype))
    gw.RemoveDeadCode()(program)
    return program


def operators(program: gw.Program) -> list[str]:
    return [gw.op_name(node) for node in program.nodes if node.op == "call_function"]


def reasons(item: gw.Pass, program: gw.Program) -> str:
    return "\n".join(map(str, item.refusals(program)))


def test_text(listing: Listing) -> None:
    program = traced(lambda m, x: x + (m.table.exp().sum(0) * 2))
    assert listing(program) == [
        "%exp = aten.exp(%table)",
        "%sum_1 = aten.sum.dim_IntList(%exp, [0])",
        "%mul = aten.mul.Tensor(%sum_1, 2)",
        "%add = aten.add.Tensor(%x, %mul)",
    ]
    before = program.clone()
    assert gw.FoldConstants()(program)
    assert listing(program) == ["%add = aten.add.Tensor(%x, %mul_folded)"]
    assert list(program.tensors()) == ["mul_folded"]
    x = torch.randn(3, 4, 4)
    assert torch.equal(program(x), before(x))
    assert not gw.FoldConstants()(program)


FOLDED: dict[str, Callable[..., Any]] = {
    "range": lambda m, x: x * torch.arange(4),
    "frozen parameter": lambda m, x: x * (m.frozen + 1),
    "two readers": lambda m, x: (x + m.table.sum(0)) * m.table.sum(0),
    "view of a weight": lambda m, x: x @ m.table.t()[:, :3],
    "several results": lambda m, x: x + m.table.chunk(2, 0)[1][0],
    "cast": lambda m, x: x * m.frozen.to(torch.float64),
    "full": lambda m, x: x * torch.full((4,), 2.5),
    "masked": lambda m, x: x.masked_fill(m.table[0] > 0, 1.0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FOLDED)
def test_folds_without_changing_a_bit(name: str, dtype: torch.dtype) -> None:
    program = traced(FOLDED[name], dtype)
    gw.EliminateCommonSubexpressions()(program)
    before = program.clone()
    assert gw.FoldConstants()(program)
    readers = [node for node in program.nodes if node.op == "call_function"]
    assert all(any(item.op != "get_attr" for item in node.all_input_nodes) for node in readers)
    x = torch.randn(3, 4, 4).to(dtype)
    assert torch.equal(program(x), before(x))
    storages = {tensor.untyped_storage().data_ptr() for tensor in before.tensors().values()}
    for name_, tensor in program.tensors().items():
        assert name_ in before.tensors() or tensor.untyped_storage().data_ptr() not in storages
        assert not tensor.requires_grad or name_ in before.tensors()
    assert not gw.FoldConstants()(program)


def test_known_sizes_are_written_out(listing: Listing) -> None:
    program = traced(lambda m, x: x.reshape(-1, 4))
    x = program.node("x")
    (reshape,) = (node for node in program.nodes if node.op == "call_function")
    with program.edit() as rewriter:
        size = rewriter.call("aten.sym_size.int", x, 2, like=reshape)
        double = rewriter.call("py.mul", size, 2, like=reshape)
        half = rewriter.call("py.floordiv", double, 2, like=reshape)
        rewriter.set_arguments(reshape, x, [-1, half])
    assert len(listing(program)) == 4
    assert gw.FoldConstants()(program)
    (line,) = listing(program)
    assert line.endswith("(%x, [-1, 4])")
    assert not gw.FoldConstants()(program)


def test_varying_sizes_stay() -> None:
    program = traced(lambda m, x: x.sum() * x.size(1))
    assert not gw.FoldConstants()(program)
    assert "aten.sym_size.int" in operators(program)


def test_trainable_parameters_are_not_folded_unasked() -> None:
    program = traced(lambda m, x: x * (m.trained + 1) + (m.frozen + 1))
    before = program.clone()
    assert gw.FoldConstants()(program)
    assert operators(program).count("aten.add.Tensor") == 2
    assert "depends on the trainable parameter 'trained'" in reasons(gw.FoldConstants(), before)
    assert "trained" in dict(program.named_parameters())
    x = torch.randn(2, 3, 4)
    assert torch.equal(program(x), before(x))
    assert gw.FoldConstants(fold_parameters=True)(program)
    assert operators(program) == ["aten.mul.Tensor", "aten.add.Tensor"]
    assert not dict(program.named_parameters())
    assert torch.equal(program(x), before(x))


def test_a_parameter_frozen_later_is_folded() -> None:
    program = traced(lambda m, x: x * (m.trained + 1))
    program.requires_grad_(False)
    assert gw.FoldConstants()(program)


def test_large_values_are_not_stored() -> None:
    """The expanded table is not stored, what it is expanded from is."""

    def function(m: Applied, x: torch.Tensor) -> torch.Tensor:
        return x.sum() + m.table.exp().expand(1000, 1000, 8, 4).sum(-1)

    program = traced(function)
    before = program.clone()
    assert gw.FoldConstants()(program)
    assert "aten.expand" in operators(program)
    assert "aten.exp" not in operators(program)
    assert "max_growth is 1048576" in reasons(gw.FoldConstants(), before)
    small = before.clone()
    assert gw.FoldConstants(max_growth=1 << 26)(small)
    assert operators(small) == ["aten.sum", "aten.add.Tensor"]


def test_a_small_value_is_stored_however_large_it_was_on_the_way() -> None:
    program = traced(lambda m, x: x + m.table.expand(10000, 8, 4).sum((0, 1)))
    assert gw.FoldConstants()(program)
    assert operators(program) == ["aten.add.Tensor"]


def test_a_value_may_be_as_large_as_what_it_frees() -> None:
    program = traced(lambda m, x: x @ m.table.t())
    assert gw.FoldConstants(max_growth=0)(program)
    shared = traced(lambda m, x: (x @ m.table.t()) @ m.table)
    assert not gw.FoldConstants(max_growth=0)(shared)
    assert "frees 0; max_growth is 0" in reasons(gw.FoldConstants(max_growth=0), shared)


def test_random_numbers_are_not_folded() -> None:
    program = traced(lambda m, x: x + torch.rand(4))
    assert not gw.FoldConstants()(program)
    assert "aten.rand" in operators(program)


def test_results_of_the_program_are_not_folded() -> None:
    program = traced(lambda m, x: (x + 1, m.table * 2))
    assert not gw.FoldConstants()(program)
    assert "it is a result of the program" in reasons(gw.FoldConstants(), program)


@pytest.mark.parametrize("tag", ["quantized", "adapter"])
def test_tagged_nodes_are_not_folded(tag: str) -> None:
    program = traced(lambda m, x: x + m.frozen * 2)
    add_tags(program.node("mul"), {tag})
    assert not gw.FoldConstants()(program)
    assert f"tagged {tag}" in reasons(gw.FoldConstants(), program)


def test_where_is_respected() -> None:
    program = traced(lambda m, x: x + m.frozen * 2)
    assert not gw.FoldConstants(ignore=gw.Select(op="aten.mul*"))(program)
    assert "not selected" in reasons(gw.FoldConstants(ignore=gw.Select(op="aten.mul*")), program)


@pytest.mark.parametrize("value", [-1, 1.5, True, "1 MiB"])
def test_bad_options(value: Any) -> None:
    with pytest.raises(gw.InputError, match="max_growth"):
        gw.FoldConstants(max_growth=value)


def test_state_dict_of_the_folded_program_saves_what_it_needs() -> None:
    program = traced(lambda m, x: x + m.frozen * 2)
    gw.FoldConstants()(program)
    assert set(program.state_dict()) == {"mul_folded"}
