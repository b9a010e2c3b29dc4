"""Storage formats beyond INT4 and INT8: narrow integers, tables of values, scales shared by blocks of rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import graphwright as gw
from graphwright.frontends.recipes import format_recipe, parse_recipe
from graphwright.ir.ops.codebook import NAMES, codebook
from graphwright.ir.parser import parse
from graphwright.ir.text import print_program
from graphwright.passes.quantization.codebooks import fit_codebook, nearest_codes
from graphwright.passes.quantization.formats import Format
from graphwright.passes.quantization.rounding.gptq import gptq
from graphwright.passes.quantization.weights import PackedWeight, pack_codes, quantize_weight

X = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(3))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(48, 64)
        self.down = nn.Linear(64, 40)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down(torch.relu(self.up(x)))
        return y


def form_of(name: str, group: int | None = 32, block_rows: int = 1, clip_search: bool = True) -> Format:
    return Format(codebook(name).bits, group, True, clip_search, codebook=name, block_rows=block_rows)


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.detach().double() - exact.detach().double()).norm() / exact.detach().double().norm())


# -- tables of values --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_rounding_finds_the_nearest_value(name: str) -> None:
    book = codebook(name)
    values = torch.tensor([value for value in book.values if abs(value) < float("inf")], dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    units = torch.randn(4000, generator=generator) * book.largest / 3
    units = torch.cat([units, units * 1e-3, values.float(), torch.tensor([0.0, -0.0, 1e30, -1e30])])
    codes = nearest_codes(units, book)
    found = book.table[codes].double()
    best = (units.double()[:, None] - values).abs().amin(1)
    assert torch.equal((units.double() - found).abs(), best)
    assert found.isfinite().all()
    assert (codes[found == 0] == book.zero).all(), "there is one zero"


@settings(max_examples=40)
@given(st.sampled_from(NAMES), st.sampled_from((1, 2, 3, 8, 17, 32, 600)), st.integers(0, 2**31), st.integers(-30, 30))
def test_scales_are_well_formed_and_the_search_is_never_worse(name: str, width: int, seed: int, size: int) -> None:
    weights = torch.randn(5, width, generator=torch.Generator().manual_seed(seed)) * 10.0**size
    weights[1], weights[2] = 0, weights[2].abs()
    book, errors = codebook(name), []
    for search in (False, True):
        scale = fit_codebook(weights, name, clip_search=search)
        assert scale.isfinite().all()
        assert (scale > 0).all()
        values = book.table[nearest_codes(weights / scale[:, None], book)].double() * scale.double()[:, None]
        assert (values[1] == 0).all()
        errors.append((values - weights.double()).square().sum(-1))
    noise = 1e-5 * weights.double().square().sum(-1)
    assert (errors[1] <= errors[0] + noise).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("group", [32, 128, 1024])
def test_the_few_ranges_tried_are_nearly_the_best_of_many(name: str, group: int) -> None:
    weights, book = torch.randn(128, group, generator=torch.Generator().manual_seed(0)), codebook(name)

    def error(ratios: list[float] | None) -> float:
        scale = fit_codebook(weights, name, clip_search=True, ratios=ratios)
        return relative(book.table[nearest_codes(weights / scale[:, None], book)] * scale[:, None], weights)

    assert error(None) <= (1.03 if book.bits == 4 else 1.07) * error([1.8 - 0.015 * step for step in range(100)])


@pytest.mark.parametrize(("name", "limit"), [("nf4", 0.1), ("fp4", 0.115), ("fp8_e4m3", 0.027), ("fp8_e5m2", 0.054)])
@pytest.mark.parametrize("columns", [1, 15, 16, 17, 64, 100, 257])
def test_whole_weights(name: str, limit: float, columns: int) -> None:
    weight = torch.randn(33, columns, generator=torch.Generator().manual_seed(2))
    for group in (16, 64, None):
        packed = quantize_weight(weight, form_of(name, group, clip_search=False))
        assert packed.zero_points is None
        assert packed.dense().shape == weight.shape
        assert relative(packed.dense(), weight) < limit
        assert packed.loss.relative == pytest.approx(relative(packed.dense(), weight), rel=1e-3, abs=1e-7)


def test_nf4_suits_normal_weights_better_than_integers() -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(2))
    losses = {
        name: quantize_weight(weight, form).loss.relative
        for name, form in (("nf4", form_of("nf4", 64)), ("fp4", form_of("fp4", 64)), ("int", Format(4, 64, True, True)))
    }
    assert losses["nf4"] < losses["fp4"]
    assert losses["nf4"] < losses["int"]


@pytest.mark.parametrize("name", ["nf4", "fp4", "fp8_e4m3"])
def test_gptq_rounds_to_tables_too(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 12, generator=generator) @ torch.randn(12, 48, generator=generator)
    x += 0.3 * torch.randn(256, 48, generator=generator)
    weight = torch.randn(20, 48, generator=generator)
    found = pack_codes(gptq(weight, x.T @ x, form_of(name)), form_of(name))
    assert isinstance(found, PackedWeight)
    nearest = quantize_weight(weight, form_of(name))
    mine, other = (relative(x @ packed.dense().T, x @ weight.T) for packed in (found, nearest))
    assert mine < 0.8 * other
    assert found.loss.relative == pytest.approx(mine, rel=0.01)


# -- narrow integers ---------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(
    st.integers(1, 4),
    st.sampled_from((1, 2, 3, 15, 16, 17, 33, 64, 130)),
    st.sampled_from((2, 3)),
    st.sampled_from((16, 64, None)),
    st.booleans(),
)
def test_narrow_codes_lose_nothing_more_than_rounding(
    rows: int, columns: int, bits: int, group: int | None, symmetric: bool
) -> None:
    weight, form = torch.randn(rows, columns), Format(bits, group, symmetric, True)
    packed = quantize_weight(weight, form)
    assert packed.qweight.shape == (rows, -(-columns // packed.group_size), packed.group_size * bits // 8)
    steps = (packed.dense() - weight).square().sum().sqrt() / weight.norm()
    assert float(steps) == pytest.approx(packed.loss.relative, rel=1e-3, abs=1e-6)


def test_bytes_are_those_of_the_codes() -> None:
    weight = torch.randn(8, 1024)
    for bits in (2, 3, 4, 8):
        assert quantize_weight(weight, Format(bits, 128, True, False)).qweight.nbytes == 8 * 1024 * bits // 8


# -- blocks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [Format(8, 32, True, True, block_rows=8), form_of("fp8_e4m3", 32, 8)])
@pytest.mark.parametrize("rows", [1, 7, 8, 9, 16, 21])
def test_rows_of_a_block_share_their_scales(form: Format, rows: int) -> None:
    weight = torch.randn(rows, 80, generator=torch.Generator().manual_seed(0))
    weight[:, 32:64] *= 100
    packed = quantize_weight(weight, form)
    assert packed.scales.shape == (rows, 3)
    for start in range(0, rows, 8):
        block = packed.scales[start : start + 8]
        assert (block == block[0]).all()
        alone = form.fit(weight[start : start + 8, :32].reshape(1, -1).contiguous().expand(1, -1))[0]
        torch.testing.assert_close(block[0, :1].float(), alone[:1], rtol=2e-3, atol=0)
    assert rows < 9 or not torch.equal(packed.scales[0], packed.scales[8])
    assert relative(packed.dense(), weight) < 0.03


def test_gptq_keeps_to_blocks() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(256, 64, generator=generator), torch.randn(20, 64, generator=generator)
    found = gptq(weight, x.T @ x, Format(4, 32, True, True, block_rows=8))
    assert (found.scales[:8] == found.scales[0]).all()
    assert (found.scales[16:] == found.scales[16]).all()
    assert found.loss.relative < 0.15


# -- the pass ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_before_and_after(name: str, listing: Any, tmp_path: Path) -> None:
    model = Mlp()
    small = gw.optimize(model, [gw.QuantizeLinears(dtype=name, group_size=32)], example_inputs=X)
    assert listing(small)[0] == (
        f"%linear_codebook = graphwright.linear_codebook(%x, %up_qweight, %up_scales, %up_bias, '{name}', 32)"
    )
    bits = codebook(name).bits
    assert small.tensors()["up.qweight"].shape == (64, 2, 4 * bits)
    assert small.report.rows[0].notes["weights"]["up.weight"]["relative"] < 0.12
    expected = model(X)
    assert relative(small(X), expected) < (0.15 if bits == 4 else 0.06)
    assert gw.QuantizeLinears(dtype=name).bits == bits
    small.save(tmp_path / "small")
    loaded = gw.Program.load(tmp_path / "small")
    assert gw.structurally_equal(loaded, small)
    assert torch.equal(loaded(X), small(X))
    x = X.clone().requires_grad_()
    small(x).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("bits", [2, 3])
def test_narrow_programs_are_saved_and_loaded(bits: int, tmp_path: Path) -> None:
    small = gw.optimize(Mlp(), [gw.QuantizeLinears(bits=bits, group_size=16, symmetric=False)], example_inputs=X)
    small.save(tmp_path / "small")
    loaded = gw.Program.load(tmp_path / "small")
    assert torch.equal(loaded(X), small(X))
    assert small.tensors()["up.qweight"].nbytes == 64 * 48 * bits // 8


@pytest.mark.parametrize("name", NAMES)
def test_text_form_and_recipe_come_back(name: str) -> None:
    item = gw.QuantizeLinears(dtype=name, block=(16, 32))
    assert list(parse_recipe(format_recipe([item])).passes) == [item]
    program = gw.trace(Mlp(), X)
    item(program)
    text = print_program(program)
    again = parse(text, program.tensors())
    assert print_program(again) == text
    assert torch.equal(again(X), program(X))


def test_blocks_of_fp8_as_checkpoints_have_them() -> None:
    item = gw.QuantizeLinears(dtype="fp8_e4m3", block=(32, 32))
    assert item == gw.QuantizeLinears(dtype="fp8_e4m3", block=[32, 32])
    small = gw.optimize(Mlp(), [item], example_inputs=X)
    scales = small.tensors()["up.scales"]
    assert scales.shape == (64, 2)
    assert [len(part.unique()) for part in (scales[:32, 0], scales[32:, 0], scales[:32, 1])] == [1, 1, 1]


def test_gptq_and_nf4_through_the_pass() -> None:
    data = [torch.randn(4, 5, 48, generator=torch.Generator().manual_seed(5))]
    small = gw.optimize(Mlp(), [gw.QuantizeLinears(dtype="nf4", group_size=16, calibration=data)], example_inputs=X)
    assert "graphwright.linear_codebook" in {gw.op_name(node) for node in small.nodes}


@pytest.mark.parametrize(
    ("options", "where", "what"),
    [
        ({"dtype": "fp6"}, "dtype", "'int', 'nf4', 'fp4'"),
        ({"dtype": "nf4", "symmetric": False}, "symmetric=False", "no zero points"),
        ({"dtype": "fp8_e4m3", "activations": "int8"}, "activations='int8'", "dtype='int'"),
        ({"block": (128,)}, "block", "such as (128, 128)"),
        ({"block": (0, 128)}, "block", "such as (128, 128)"),
        ({"block": (128, 8)}, "block", "multiple of 16 columns"),
        ({"block": 128}, "block", "multiple of 16 columns"),
        ({"block": (128, 128), "group_size": 64}, "block", "leave group_size out"),
        ({"block": (128, 128), "activations": "int8"}, "activations='int8'", "one scale per channel"),
    ],
)
def test_bad_options_are_errors_at_once(options: dict[str, Any], where: str, what: str) -> None:
    with pytest.raises(gw.InputError) as caught:
        gw.QuantizeLinears(**options)
    assert where in str(caught.value)
    assert what in str(caught.value)
