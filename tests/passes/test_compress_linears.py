"""``CompressLinears`` and ``DecompressLinears``: what is left of a sparse weight, and back, losslessly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import graphwright as gw
from graphwright.ir.errors import InputError
from graphwright.ir.provenance import add_tags

Listing = Callable[[gw.Program], list[str]]
X = torch.randn(2, 5, 40, generator=torch.Generator().manual_seed(3))


class Mlp(nn.Module):
    """Two linears, of the first of which most weights are zeros."""

    def __init__(self, dtype: torch.dtype = torch.float32, share: float = 0.3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(40, 30), nn.Linear(30, 40, bias=False)
        with torch.no_grad():
            self.up.weight *= torch.rand(30, 40) < share
        self.to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down(torch.relu(self.up(x)))
        return y


class Tied(nn.Module):
    """A weight that two linears read, and another that a product reads too."""

    def __init__(self, *, whole: bool = False) -> None:
        super().__init__()
        self.weight, self.whole = nn.Parameter(torch.zeros(40, 40)), whole

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.linear(nn.functional.linear(x, self.weight), self.weight)
        return y + self.weight.sum() if self.whole else y


def reasons(program: gw.Program, item: gw.Pass) -> dict[str, str]:
    return {refusal.node: refusal.reason for refusal in item.refusals(program)}


def quantized(bits: int, group: int | None, *, symmetric: bool) -> gw.Program:
    program = gw.trace(Mlp(), X)
    gw.QuantizeLinears(bits=bits, group_size=group, symmetric=symmetric)(program)
    return program


def test_before_and_after(listing: Listing) -> None:
    program = gw.trace(Mlp(), X)
    item = gw.CompressLinears()
    assert item(program)
    assert listing(program)[0] == (
        "%linear_sparse = graphwright.linear_sparse(%x, %up_weight_mask, %up_weight_values, %up_weight_row_offsets, "
        "None, None, %up_bias, 'float', 0)"
    )
    assert listing(program)[2].startswith("%linear_1 = aten.linear(")
    assert not item(program)
    assert "up.weight" not in program.tensors()


def test_the_pipeline_holds_it_to_exactness() -> None:
    model = Mlp()
    small = gw.optimize(model, [gw.CompressLinears()], example_inputs=(X,), target="reference")
    torch.testing.assert_close(small(X), model(X), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_weights_come_back_bit_for_bit(dtype: torch.dtype, listing: Listing) -> None:
    model = Mlp(dtype)
    with torch.no_grad():
        model.up.weight[3, 4], model.up.weight[3, 5] = torch.inf, torch.nan
        model.up.weight += 0.0  # what the mask made of negative weights is -0.0
    program = gw.trace(model, X.to(dtype))
    before = listing(program)
    assert gw.CompressLinears()(program)
    assert gw.DecompressLinears()(program)
    assert not gw.DecompressLinears()(program)
    assert listing(program)[0].split("(")[1].replace("weight_1", "weight") == before[0].split("(")[1]
    back = program.tensors()["up.weight"]
    assert isinstance(back, nn.Parameter)
    assert back.requires_grad == model.up.weight.requires_grad
    view = torch.int64 if dtype == torch.float64 else torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(back.detach().view(view), model.up.weight.detach().view(view))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group"), [(8, None), (8, 16), (4, None), (4, 16)])
def test_codes_come_back(bits: int, group: int | None, symmetric: bool) -> None:
    program = quantized(bits, group, symmetric=symmetric)
    before, wanted = dict(program.tensors()), program(X)
    assert gw.CompressLinears()(program)
    torch.testing.assert_close(program(X), wanted, rtol=1e-6, atol=1e-6)
    assert gw.DecompressLinears()(program)
    after = program.tensors()
    assert sorted(after) == sorted(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(program(X), wanted)


def rounding(*, static: bool, share: float = 0.3) -> gw.Program:
    """Its activations are rounded to 8 bits, on a grid known beforehand or as they come."""
    program = gw.trace(Mlp(share=share), X)
    gw.QuantizeLinears(bits=8, activations="int8", calibration=[torch.randn(9, 5, 40)] if static else None)(program)
    return program


@pytest.mark.parametrize("static", [False, True])
def test_weights_of_linears_that_round_activations_come_back(static: bool, listing: Listing) -> None:
    program = rounding(static=static)
    before, lines, wanted = dict(program.tensors()), listing(program), program(X)
    kind = "static" if static else "dynamic"
    assert lines[0].startswith(f"%linear_int8_{kind} = ")
    assert gw.CompressLinears()(program)
    parts = "%up_qweight_mask, %up_qweight_values, %up_qweight_row_offsets"
    rest = lines[0].partition("%up_qweight, ")[2]
    assert listing(program)[0] == f"%linear_sparse_{kind} = graphwright.linear_sparse_{kind}(%x, {parts}, {rest}"
    assert torch.equal(program(X), wanted)
    assert not gw.CompressLinears()(program)
    assert gw.describe_sparsity(program).linears[0].sparsity == pytest.approx(0.7, abs=0.05)
    assert gw.DecompressLinears()(program)
    assert not gw.DecompressLinears()(program)
    assert listing(program)[0].split("(")[1].replace("qweight_1", "qweight") == lines[0].split("(")[1]
    after = program.tensors()
    assert sorted(after) == sorted(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(program(X), wanted)


def test_a_mask_is_followed_through_rounded_activations() -> None:
    program = gw.trace(Mlp(share=1.0), X)
    for item in (gw.PruneLinears(sparsity=0.6, where="up"), gw.QuantizeLinears(bits=8, activations="int8")):
        item(program)
    assert gw.CompressLinears()(program)
    row = next(row for row in gw.describe_sparsity(program).linears if row.weight == "up.qweight_mask")
    assert row.intact
    assert row.pattern == "unstructured"
    with pytest.raises(InputError, match="the weight is compressed already"):
        gw.PruneLinears(sparsity=0.8, where="up")(program)


def test_it_takes_fewer_bytes() -> None:
    program = quantized(8, None, symmetric=True)
    before = program.tensors()["up.qweight"].nbytes
    gw.CompressLinears()(program)
    tensors = program.tensors()
    assert tensors["up.qweight_mask"].nbytes + tensors["up.qweight_values"].nbytes < 0.5 * before


def test_values_train_and_zeros_stay() -> None:
    program = gw.trace(Mlp(), X)
    gw.CompressLinears()(program)
    values = program.tensors()["up.weight_values"]
    program(X).square().sum().backward()
    assert values.grad is not None
    assert bool((values.grad != 0).any())


def test_it_saves_and_loads(tmp_path: Path) -> None:
    program = gw.trace(Mlp(), X)
    gw.CompressLinears()(program)
    program.save(tmp_path / "program")
    assert torch.equal(gw.Program.load(tmp_path / "program")(X), program(X))


def test_linears_that_share_a_weight_go_on_sharing_it() -> None:
    program = gw.trace(Tied(), X)
    assert gw.CompressLinears()(program)
    assert len([name for name in program.tensors() if name.endswith("_values")]) == 1
    assert gw.DecompressLinears()(program)
    assert list(program.tensors()) == ["weight"]


def test_reasons_to_leave_a_weight_alone() -> None:
    program = gw.trace(Mlp(), X)
    (reason,) = reasons(program, gw.CompressLinears()).values()
    assert reason == "0.0% of its weights are zeros, fewer than min_sparsity (50.0%)"
    assert "fewer than min_sparsity (95.0%)" in reasons(program, gw.CompressLinears(min_sparsity=0.95))["linear"]
    assert reasons(program, gw.CompressLinears(where="down"))["linear"] == "not selected by where= / ignore="
    add_tags(next(node for node in program.nodes if node.name == "linear"), ("adapter",))
    assert reasons(program, gw.CompressLinears())["linear"].startswith("it is tagged adapter")
    whole = reasons(gw.trace(Tied(whole=True), X), gw.CompressLinears())
    assert set(whole.values()) == {"its weight is also read by %sum_1, which needs it whole"}
    narrow = reasons(quantized(2, None, symmetric=True), gw.CompressLinears(min_sparsity=0.0))
    assert narrow["linear_nbits"] == "codes of 2 bits take hardly more than the bits of a mask"


@pytest.mark.parametrize("bad", [-0.1, 1.1, "0.5", True, float("nan")])
def test_shares_that_are_none(bad: object) -> None:
    with pytest.raises(InputError, match="must be a number from 0 to 1"):
        gw.CompressLinears(min_sparsity=bad)


@given(st.floats(0, 1), st.sampled_from((0.0, 0.5)))
@settings(max_examples=10, deadline=None)
def test_any_share_of_zeros(share: float, least: float) -> None:
    program = gw.trace(Mlp(share=share), X)
    wanted, weight = program(X), program.tensors()["up.weight"].detach()
    changed = gw.CompressLinears(min_sparsity=least)(program)
    assert changed == (bool((weight == 0).float().mean() >= least) or least == 0.0)
    torch.testing.assert_close(program(X), wanted, rtol=1e-6, atol=1e-6)
