"""RemoveNoOps."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import graphwright as gw
from graphwright.ir.provenance import add_tags
from graphwright.passes.cleanup.casts import holds

Listing = Callable[[gw.Program], list[str]]
Function = Callable[[torch.Tensor], Any]


class Applied(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(x)


def traced(function: Function, x: torch.Tensor | None = None, **options: Any) -> gw.Program:
    program = gw.trace(Applied(function), torch.randn(2, 5, 8) if x is None else x, **options)
    gw.RemoveDeadCode()(program)
    return program


def operators(program: gw.Program) -> list[str]:
    return [gw.op_name(node) for node in program.nodes if node.op == "call_function"]


def reasons(program: gw.Program) -> str:
    return "\n".join(map(str, gw.RemoveNoOps().refusals(program)))


def test_text(listing: Listing) -> None:
    program = traced(lambda x: (functional.dropout(x, 0.1, False).float()[:, 0:] * 1.0).relu())
    assert listing(program) == [
        "%dropout = aten.dropout(%x, 0.1, False)",
        "%to = aten.to.dtype(%dropout, torch.float32)",
        "%slice_1 = aten.slice.Tensor(%to, 0, 0, 9223372036854775807)",
        "%slice_2 = aten.slice.Tensor(%slice_1, 1, 0, 9223372036854775807)",
        "%mul = aten.mul.Tensor(%slice_2, 1.0)",
        "%relu = aten.relu(%mul)",
    ]
    before = program.clone()
    assert gw.RemoveNoOps()(program)
    assert listing(program) == ["%relu = aten.relu(%x)"]
    x = torch.randn(1, 3, 8)
    assert torch.equal(program(x), before(x))
    assert not gw.RemoveNoOps()(program)


# each between two exponentials, so that neither inputs nor outputs are in play
REMOVED: dict[str, Function] = {
    "dropout off": lambda x: functional.dropout(x, 0.5, False),
    "dropout of nothing": lambda x: functional.dropout(x, 0.0, True),
    "feature dropout off": lambda x: functional.dropout1d(x, 0.5, False),
    "alpha dropout off": lambda x: functional.alpha_dropout(x, 0.5, False),
    "to dtype": lambda x: x.to(torch.float32),
    "to device": lambda x: x.to("cpu", torch.float32),
    "to copy": lambda x: x.to(torch.float32, copy=True),
    "type_as": lambda x: x.type_as(x.exp()),
    "slice": lambda x: x[:, :, :8],
    "reshape": lambda x: x.reshape(x.shape),
    "view": lambda x: x.view(x.size(0), -1, 8),
    "expand": lambda x: x.expand(-1, -1, 8),
    "flatten of one axis": lambda x: x.flatten(1, 1),
    "permute": lambda x: x.permute(0, 1, 2),
    "transpose of one axis": lambda x: x.transpose(1, -2),
    "times one": lambda x: x * 1,
    "one times": lambda x: 1.0 * x,
    "times ones": lambda x: x * torch.ones(8),
    "over one": lambda x: x / 1.0,
    "minus zero": lambda x: x - 0.0,
    "plus minus zero": lambda x: x + (-0.0),
    "power of one": lambda x: x**1,
    "clone": lambda x: x.clone(),
    "contiguous": lambda x: x.mT.contiguous().mT,
    "cat of one": lambda x: torch.cat([x], 1),
    "unsqueeze, squeeze": lambda x: x.unsqueeze(1).squeeze(1),
    "unsqueeze, select": lambda x: x.unsqueeze(-1)[..., 0],
    "squeeze, unsqueeze": lambda x: x[:, :, :1].exp().squeeze(-1).unsqueeze(2).exp().expand(-1, -1, 8).exp(),
    "squeeze of nothing": lambda x: x.squeeze(2),
    "transposes": lambda x: x.transpose(1, 2).transpose(2, 1),
    "mixed transposes": lambda x: x.mT.transpose(-1, -2),
    "permutations": lambda x: x.permute(1, 2, 0).permute(2, 0, 1),
    "three permutations": lambda x: x.permute(1, 2, 0).permute(1, 2, 0).permute(1, 2, 0),
    "double cast": lambda x: x.double().float(),
    "triple cast": lambda x: x.double().to(torch.float64).float(),
}


@pytest.mark.parametrize("name", REMOVED)
def test_removes(name: str) -> None:
    program = traced(lambda x: REMOVED[name](x.exp()).exp())
    before = program.clone()
    assert gw.RemoveNoOps()(program)
    gw.RemoveDeadCode()(program)
    if name != "squeeze, unsqueeze":
        assert [item for item in operators(program) if item != "aten.sym_size.int"] == ["aten.exp", "aten.exp"]
    else:
        assert "aten.squeeze.dim" not in operators(program)
    for x in (torch.randn(2, 5, 8), torch.randn(1, 1, 8), torch.full((2, 3, 8), -0.0)):
        assert torch.equal(program(x), before(x))
    assert not gw.RemoveNoOps()(program)


INTEGERS: dict[str, Function] = {
    "plus zero": lambda x: x + 0,
    "zero plus": lambda x: 0 + x,
    "minus zero": lambda x: x - 0,
    "plus zeros": lambda x: x + torch.zeros(8, dtype=torch.int64),
    "times one": lambda x: x * 1,
    "detach": lambda x: x.detach(),
}


@pytest.mark.parametrize("name", INTEGERS)
def test_removes_on_integers(name: str) -> None:
    example = torch.randint(-5, 5, (2, 5, 8))
    program = traced(lambda x: INTEGERS[name](x.abs()).abs(), example)
    before = program.clone()
    assert gw.RemoveNoOps()(program)
    assert operators(program) == ["aten.abs", "aten.abs"]
    assert torch.equal(program(example), before(example))


BOOLEANS: dict[str, Function] = {
    "and true": lambda x: x & torch.ones((), dtype=torch.bool),
    "true and": lambda x: x.new_ones((), dtype=torch.bool) & x,
    "or false": lambda x: x | torch.zeros(8, dtype=torch.bool),
    "logical": lambda x: torch.logical_and(x, torch.full((1,), True)),
    "cast": lambda x: x.float().bool(),
}


@pytest.mark.parametrize("name", BOOLEANS)
def test_removes_on_booleans(name: str) -> None:
    example = torch.rand(2, 5, 8) < 0.5
    program = traced(lambda x: ~BOOLEANS[name](~x), example)
    before = program.clone()
    assert gw.Pipeline(passes=(gw.RemoveNoOps(), gw.RemoveDeadCode()))(program)
    assert operators(program) == ["aten.bitwise_not", "aten.bitwise_not"]
    assert torch.equal(program(example), before(example))


def test_a_folded_constant_is_looked_into() -> None:
    program = traced(lambda x: ((x > 0) & (torch.arange(8) >= 0)).float())
    assert gw.Cleanup()(program)
    assert operators(program) == ["aten.gt.Scalar", "aten.to.dtype"]


MERGED: dict[str, tuple[Function, list[str]]] = {
    "reshapes": (lambda x: x.reshape(-1, 8).reshape(-1, 4).reshape(-1, 2), ["aten.reshape"]),
    "flatten, reshape": (lambda x: x.flatten().reshape(-1, 2), ["aten.reshape"]),
    "permutations": (lambda x: x.permute(1, 2, 0).permute(1, 2, 0), ["aten.permute"]),
    "to one transpose": (lambda x: x.permute(1, 2, 0).permute(1, 0, 2), ["aten.transpose.int"]),
    "casts": (lambda x: x.bfloat16().float().double(), ["aten.to.dtype", "aten.to.dtype"]),
}


@pytest.mark.parametrize("name", MERGED)
def test_merges_chains(name: str) -> None:
    function, expected = MERGED[name]
    program = traced(lambda x: function(x.exp()).exp())
    before = program.clone()
    gw.RemoveNoOps()(program)
    gw.RemoveDeadCode()(program)
    assert operators(program) == ["aten.exp", *expected, "aten.exp"]
    x = torch.randn(1, 4, 8)
    assert torch.equal(program(x), before(x))
    assert not gw.RemoveNoOps()(program)


def test_a_chain_with_another_reader_stays() -> None:
    program = traced(lambda x: (x.permute(1, 2, 0).exp(), x.permute(1, 2, 0).permute(1, 0, 2)))
    gw.EliminateCommonSubexpressions()(program)
    assert not gw.RemoveNoOps()(program)


def test_view_becomes_reshape_so_that_layout_may_change(listing: Listing) -> None:
    """Without contiguous() the view would fail; a reshape does not."""
    program = traced(lambda x: x.transpose(0, 1).contiguous().view(-1, 8))
    before = program.clone()
    assert gw.RemoveNoOps()(program)
    assert operators(program) == ["aten.transpose.int", "aten.reshape"]
    x = torch.randn(4, 6, 8)
    assert torch.equal(program(x), before(x))


REFUSED: dict[str, tuple[Function, str]] = {
    "dropout on": (lambda x: functional.dropout(x, 0.5, True), "the dropout is on"),
    "float plus zero": (lambda x: x + 0.0, "turns -0.0 into 0.0"),
    "float minus minus zero": (lambda x: x - (-0.0), "turns -0.0 into 0.0"),
    "float plus zeros": (lambda x: x + torch.zeros(8), "turns -0.0 into 0.0"),
    "rounding casts": (lambda x: x.half().float(), "f16 does not hold every value of f32"),
    "rounding to integers": (lambda x: x.int().float(), "i32 does not hold every value of f32"),
    "detach": (lambda x: x.detach(), "stops the gradient"),
    "integer and": (lambda x: x.long() & torch.ones((), dtype=torch.int64), "the operands are integers"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name: str) -> None:
    function, reason = REFUSED[name]
    program = traced(lambda x: function(x.exp()).exp())
    count = len(operators(program))
    assert reason in reasons(program)
    gw.RemoveNoOps()(program)
    assert len(operators(program)) == count


UNTOUCHED: dict[str, Function] = {
    "dtype": lambda x: x.to(torch.float16),
    "promotion": lambda x: x * torch.ones((8,), dtype=torch.float64),
    "broadcast": lambda x: x[:, :1] * torch.ones(5, 8),
    "part of a slice": lambda x: x[:, 1:],
    "other half": lambda x: x[:, :, :7],
    "every second": lambda x: x[:, :, ::2],
    "expand": lambda x: x[:, :, :1].expand(-1, -1, 8),
    "square transpose": lambda x: x[:, :, :, None].expand(-1, -1, -1, 8).exp().transpose(2, 3),
    "other transposes": lambda x: x[..., None].exp().transpose(0, 1).exp().transpose(1, 2),
    "minus one": lambda x: x - 1,
    "reversed": lambda x: 0 - x,
    "inverted": lambda x: 1 / x,
    "scaled second operand": lambda x: torch.add(torch.zeros(8), x, alpha=2),
    "cat of two": lambda x: torch.cat([x, x], 1),
    "other axis": lambda x: x.unsqueeze(1).exp().squeeze(2) if x.size(1) == 1 else x.unsqueeze(1),
}


@pytest.mark.parametrize("name", UNTOUCHED)
def test_leaves_alone(name: str) -> None:
    program = traced(lambda x: UNTOUCHED[name](x.exp()).exp())
    gw.RemoveNoOps()(program)
    gw.RemoveDeadCode()(program)
    before = operators(program)
    assert len(before) > 2
    assert not gw.RemoveNoOps()(program)
    assert operators(program) == before


def test_squeeze_of_a_varying_size_stays() -> None:
    """For size 1 it does something; the trace shows other sizes only."""
    program = traced(lambda x: x.exp().exp())
    inner, outer = (node for node in program.nodes if node.op == "call_function")
    with program.edit() as rewriter:
        rewriter.set_arguments(outer, rewriter.call("aten.squeeze.dim", inner, 0, like=outer))
    assert not gw.RemoveNoOps()(program)
    assert "the size batch may be 1" in reasons(program)


def test_an_input_is_not_returned_itself() -> None:
    for function in (lambda x: x.clone(), lambda x: x * 1, lambda x: x + 0):
        program = traced(function, torch.arange(6).reshape(2, 3))
        assert not gw.RemoveNoOps()(program)
        assert "return its own input" in reasons(program)


def test_a_weight_is_not_returned_itself() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(3))

        def forward(self, x: torch.Tensor) -> Any:
            return x + 1, self.table.clone()

    program = gw.trace(Model(), torch.randn(2, 3))
    assert not gw.RemoveNoOps()(program)
    assert "return its own weight" in reasons(program)


def test_layout_is_kept_where_something_depends_on_it() -> None:
    program = traced(lambda x: x.transpose(0, 1).contiguous().as_strided((4, 4), (4, 1)), dynamic=None)
    before = program.clone()
    assert not gw.RemoveNoOps()(program)
    assert "on which %as_strided" in reasons(program)
    x = torch.randn(2, 5, 8)
    assert torch.equal(program(x), before(x))


def test_a_view_outside_the_selection_keeps_the_layout() -> None:
    program = traced(lambda x: x.transpose(0, 1).contiguous().view(-1, 8))
    item = gw.RemoveNoOps(ignore=gw.Select(op="aten.view"))
    assert not item(program)
    assert "on which %view" in "\n".join(map(str, item.refusals(program)))


def test_tags_and_where_are_respected() -> None:
    program = traced(lambda x: (x * 1).exp())
    assert not gw.RemoveNoOps(ignore=gw.Select(op="aten.mul*"))(program)
    assert gw.RemoveNoOps(where=gw.Select(op="aten.mul*"))(program.clone())
    add_tags(program.node("mul"), {"adapter"})
    assert not gw.RemoveNoOps()(program)
    assert "tagged adapter" in reasons(program)


def test_holds_agrees_with_torch() -> None:
    """A dtype holds another's values exactly if its extremes and odd values survive the way there and back."""
    dtypes = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
    dtypes += [torch.float16, torch.bfloat16, torch.float32, torch.float64]

    def samples(dtype: torch.dtype) -> torch.Tensor:
        if dtype == torch.bool:
            return torch.tensor([False, True])
        if dtype.is_floating_point:
            info = torch.finfo(dtype)
            return torch.tensor([info.min, info.max, info.tiny, 1 + info.eps, -1 - info.eps, 0.5], dtype=dtype)
        top = torch.iinfo(dtype)
        return torch.tensor([top.min, top.min + 1, top.max, top.max - 1, 1], dtype=dtype)

    for wide, narrow in itertools.product(dtypes, dtypes):
        values = samples(narrow)
        survives = torch.equal(values.to(wide).to(narrow), values)
        if survives and not wide.is_floating_point and not narrow.is_floating_point:
            # Integers wrap around on the way and back again, so look at the values themselves.
            survives = values.to(wide).tolist() == values.to(torch.int64).tolist()
        if survives and narrow == torch.bool:
            survives = True
        assert holds(wide, narrow) == survives, (wide, narrow)
