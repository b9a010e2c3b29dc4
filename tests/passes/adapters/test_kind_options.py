"""Options of kinds at layers that are wrong, and adapters that stand in each other's way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.passes.adapters.cases import Net, X, stirred

import graphwright as gw


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: gw.DoRA(rank=0), "dora: rank"),
        (lambda: gw.IA3(side="inside"), "'output' or 'input'"),
        (lambda: gw.LoKr(factor=0), "lokr: factor"),
        (lambda: gw.LoHa(alpha=float("nan")), "loha: alpha"),
        (lambda: gw.VeRA(size=(3,)), "two sizes"),
        (lambda: gw.OFT(block=1), "oft: block"),
        (lambda: gw.Compacter(bottleneck=10, n=4), "n=4 does not divide bottleneck=10"),
        (lambda: gw.Compacter(activation="tanh"), "compacter: activation"),
    ],
)
def test_wrong_options(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(gw.InputError, match=said):
        make()


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (gw.OFT(block=7), r"block=7 does not divide 24.*\n.*block=6"),
        (gw.ETHERPlus(blocks=5), r"blocks=5 does not divide 24.*\n.*blocks=4"),
        (gw.Compacter(bottleneck=10, n=5), "n=5 does not divide the 24 outputs"),
        (gw.VeRA(size=(24, 20)), r"wider than size=\[24, 20\]"),
        (gw.LoRAXS(rank=30), "rank 30 is above"),
    ],
)
def test_options_that_do_not_go_with_a_place(kind: gw.AdapterKind, said: str) -> None:
    program = gw.trace(Net(), X)
    before = str(program)
    with pytest.raises(gw.InputError, match=said):
        gw.InsertAdapters(kind, where="blocks.0.q")(program)
    assert str(program) == before


def test_a_merge_does_not_take_in_what_reads_something_else() -> None:
    """LoRA was put beside a layer before IA3 rescaled what the layer reads."""
    program = gw.trace(Net(), X)
    gw.InsertAdapters(gw.LoRA(rank=2), where="blocks.0.q", adapter_name="first")(program)
    gw.InsertAdapters(gw.IA3(side="input"), where="blocks.0.q", adapter_name="second")(program)
    stirred(program)
    wanted = program(X)
    with pytest.raises(gw.InputError, match=r"adapter 'first' reads %\w+, but its layer reads"):
        gw.MergeAdapters(adapters=("first",))(program)
    assert torch.equal(program(X), wanted)
    gw.MergeAdapters(adapters=("second",))(program)
    gw.MergeAdapters(adapters=("first",))(program)
    assert (program(X) - wanted).norm() <= 2e-6 * wanted.norm()


def test_a_packed_weight_has_no_norm_for_dora() -> None:
    passes = [gw.QuantizeLinears(bits=8, group_size=16), gw.InsertAdapters(gw.DoRA(rank=2), where="blocks.*")]
    with pytest.raises(gw.InputError, match="floating point"):
        gw.optimize(Net(), passes, example_inputs=X)
