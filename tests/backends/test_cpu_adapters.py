"""Decoders with adapters beside their weights: no step leaves the executor, and logits are the reference's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.frontends.decoders import traced
from torch import fx, nn

import graphwright as gw
from graphwright.backends.reference.session import ReferenceSession
from graphwright.ir.names import op_name
from graphwright.ir.provenance import path_of, tags_of
from graphwright.ir.rewriter import Rewriter

pytest.importorskip("transformers")
pytest.importorskip("graphwright.backends.cpu._native")


class Branch:
    """Makes the nodes of one adapter at one place."""

    def __init__(self, rewriter: Rewriter, like: fx.Node, number: int) -> None:
        self.rewriter, self.like, self.number = rewriter, like, number

    def __call__(self, op: str, *operands: Any) -> fx.Node:
        return self.rewriter.call(op, *operands, like=self.like, tags=("adapter",))

    def weight(self, *shape: int) -> fx.Node:
        self.number += 1
        generator = torch.Generator().manual_seed(self.number)
        values = torch.randn(shape, generator=generator) * 0.3
        return self.rewriter.weight(f"adapter.{self.number}", nn.Parameter(values), like=self.like, tags=("adapter",))


def low_rank(make: Branch, x: fx.Node, y: fx.Node) -> fx.Node:
    hidden = make("aten.mul.Tensor", make("aten.linear", x, make.weight(3, _width(x))), 1.5)
    return make("aten.add.Tensor", y, make("aten.linear", hidden, make.weight(_width(y), 3)))


def kronecker(make: Branch, x: fx.Node, y: fx.Node) -> fx.Node:
    a, b = make.weight(4, 8), make.weight(_width(y) // 4, _width(x) // 8)
    return make("aten.add.Tensor", y, make("graphwright.kron_linear", x, a, b, 0.5))


def kronecker_with_residual(make: Branch, x: fx.Node, y: fx.Node) -> fx.Node:
    kept = make("aten.mul.Tensor", x, make.weight(1) if make.number % 2 else make.weight())
    return make("aten.add.Tensor", kronecker(make, x, y), kept)


def factors(make: Branch, x: fx.Node, y: fx.Node) -> fx.Node:
    return make("aten.mul.Tensor", y, make.weight(_width(y)))


def low_rank_that_is_not_linear(make: Branch, x: fx.Node, y: fx.Node) -> fx.Node:
    hidden = make("aten.linear", x, make.weight(4, _width(x)))
    inner = hidden
    for _ in range(2):
        inner = make("aten.leaky_relu", make("aten.linear", inner, make.weight(4, 4)), 0.8)
    total = make("aten.add.Tensor", hidden, make("aten.layer_norm", inner, [4]))
    return make("aten.add.Tensor", y, make("aten.linear", total, make.weight(_width(y), 4)))


def bottleneck(make: Branch, x: fx.Node, y: fx.Node) -> fx.Node:
    hidden = make("aten.gelu", make("aten.linear", y, make.weight(5, _width(y)), make.weight(5)))
    return make("aten.add.Tensor", y, make("aten.linear", hidden, make.weight(_width(y), 5), make.weight(_width(y))))


Adapter = Callable[[Branch, fx.Node, fx.Node], fx.Node]
# Name -> what it makes, and the ends of the paths of the linears it is put beside.
ADAPTERS: dict[str, tuple[Adapter, tuple[str, ...]]] = {
    "lora": (low_rank, ("q_proj", "v_proj")),
    "lora everywhere": (low_rank, ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")),
    "krona": (kronecker, ("q_proj", "v_proj")),
    "krona beside a block": (kronecker, ("down_proj",)),
    "krona beside a block, with a residual": (kronecker_with_residual, ("down_proj",)),
    "ia3": (factors, ("k_proj", "v_proj", "up_proj")),
    "loda": (low_rank_that_is_not_linear, ("q_proj", "v_proj")),
    "houlsby": (bottleneck, ("o_proj", "down_proj")),
}


def _width(node: fx.Node) -> int:
    return int(node.meta["val"].shape[-1])


def adapted(name: str) -> gw.Program:
    program: gw.Program = traced("llama")[1].clone()
    adapter, ends = ADAPTERS[name]
    with program.edit() as rewriter:
        for number, node in enumerate(list(program.nodes)):
            if node.op != "call_function" or not path_of(node).endswith(ends) or "adapter" in node.name:
                continue
            made = Branch(rewriter, node, 100 * number)
            block = path_of(node).rpartition(".")[0]
            start = (
                next(each for each in program.nodes if path_of(each) == f"{block}.gate_proj")
                if "beside" in name
                else node
            )
            before = set(program.nodes)
            result = adapter(made, start.args[0], node)
            rewriter.redirect(node, result, besides=set(program.nodes) - before)
    return program


def logits(session: Any, cuts: list[int]) -> torch.Tensor:
    """Of every token of a text that is taken in pieces."""
    tokens = torch.randint(0, 97, (1, sum(cuts)), generator=torch.Generator().manual_seed(5))
    found, start, zero = [], 0, torch.zeros(1, dtype=torch.int64)
    for length in cuts:
        piece, rows = tokens[:, start : start + length], torch.arange(length).unsqueeze(0)
        found.append(session.step(piece, zero, torch.tensor([start]), rows).clone())
        start += length
    return torch.cat(found, 1)


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("name", ADAPTERS)
def test_steps_stay_in_the_executor_and_agree_with_the_reference(name: str, quantized: bool) -> None:
    program = adapted(name)
    assert not torch.equal(logits(_reference(program), [9]), logits(_reference(traced("llama")[1]), [9]))
    passes: list[Any] = [gw.PrepareDecoder(length=32)]
    if quantized:
        passes.append(gw.QuantizeLinears(bits=4, group_size=16, clip_search=False))
    small: Any = gw.optimize(program, passes, target="cpu", verify=False)
    assert not [use for use in small.explain() if use.kernel in ("torch", "reference")]
    wanted = logits(_reference(small), [9])
    for cuts in ([9], [1] * 9, [4, 1, 1, 3]):
        found = logits(small.session(slots=1, capacity=16), cuts)
        # Rounding of float32 through a few layers of random weights.
        assert float((found - wanted).norm() / wanted.norm()) < 2e-5, cuts


@pytest.mark.parametrize("name", ["lora", "krona", "krona beside a block"])
def test_the_sum_with_the_base_is_an_epilogue(name: str) -> None:
    small: Any = gw.optimize(adapted(name), [gw.PrepareDecoder(length=32)], target="cpu", verify=False)
    calls = [node for node in small.nodes if node.op == "call_function" and "adapter" in tags_of(node)]
    sums = {node.name for node in calls if op_name(node) == "aten.add.Tensor"}
    kernels = [use.kernel for use in small.explain() if use.node in sums]
    assert len(kernels) == len(sums) > 0
    assert all(kernel.startswith("epilogue of ") for kernel in kernels), kernels


def test_results_do_not_depend_on_threads() -> None:
    passes = [gw.PrepareDecoder(length=32)]
    for name in ("lora", "krona beside a block, with a residual"):
        small: Any = gw.optimize(adapted(name), passes, target="cpu", verify=False)
        before, found = torch.get_num_threads(), []
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                found.append(logits(small.session(slots=1, capacity=16), [7, 1, 1]))
        finally:
            torch.set_num_threads(before)
        assert all(torch.equal(each, found[0]) for each in found), name


def _reference(program: Any) -> ReferenceSession:
    return ReferenceSession(program, slots=1, capacity=16)
