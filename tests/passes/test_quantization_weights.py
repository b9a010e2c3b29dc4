"""Whole weights: layout, dtypes, rows that do not divide, what cannot be quantised."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import graphwright as gw
from graphwright.ir.ops.quantization import dequantize
from graphwright.passes.quantization import weights as module
from graphwright.passes.quantization.formats import Format
from graphwright.passes.quantization.loss import Loss, report_entries
from graphwright.passes.quantization.weights import PackedWeight, quantize_weight, quantize_weight_int8


def opened(packed: PackedWeight, bits: int, columns: int) -> torch.Tensor:
    return dequantize(packed.qweight, packed.scales, packed.zero_points, bits, columns, torch.float64)


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found - exact.double()).norm() / exact.double().norm())


# -- layout and dtypes -------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    st.integers(1, 6),
    st.sampled_from((1, 2, 3, 15, 16, 17, 31, 33, 64, 127, 130)),
    st.sampled_from((4, 8)),
    st.sampled_from((16, 32, 64, None)),
    st.booleans(),
)
def test_shapes_and_storage(rows: int, columns: int, bits: int, group: int | None, symmetric: bool) -> None:
    weight = torch.randn(rows, columns)
    packed = quantize_weight(weight, Format(bits, group, symmetric, True))
    size = packed.group_size
    assert size == (group or columns + columns % 2)
    groups = math.ceil(columns / size)
    assert (packed.qweight.dtype, packed.qweight.shape) == (torch.uint8, (rows, groups, size * bits // 8))
    assert packed.scales.shape == (rows, groups)
    assert (packed.zero_points is None) == symmetric
    if packed.zero_points is not None:
        assert (packed.zero_points.dtype, packed.zero_points.shape) == (torch.uint8, (rows, groups))
    # What lies beyond the last column stands for nothing.
    padded = dequantize(packed.qweight, packed.scales, packed.zero_points, bits, groups * size, torch.float64)
    assert (padded[:, columns:] == 0).all()


@pytest.mark.parametrize(
    ("bits", "group", "symmetric", "limit"),
    [
        (8, None, True, 0.01),
        (8, None, False, 0.01),
        (8, 32, True, 0.006),
        (4, 32, True, 0.085),
        (4, 32, False, 0.08),
        (4, 128, True, 0.105),
        (4, None, True, 0.13),
    ],
)
def test_normal_weights_lose_what_theory_says(bits: int, group: int | None, symmetric: bool, limit: float) -> None:
    weight = torch.randn(64, 512)
    packed = quantize_weight(weight, Format(bits, group, symmetric, True))
    error = relative(opened(packed, bits, 512), weight)
    assert limit / 2 < error < limit
    assert packed.loss.relative == pytest.approx(error, rel=1e-3)
    assert packed.loss.sqnr_db == pytest.approx(-20 * math.log10(error), abs=0.01)


def test_smaller_groups_and_zero_points_help() -> None:
    weight = torch.randn(64, 512)
    loss = {
        (group, symmetric): quantize_weight(weight, Format(4, group, symmetric, True)).loss.relative
        for group in (32, 128, None)
        for symmetric in (True, False)
    }
    assert loss[32, True] < loss[128, True] < loss[None, True]
    assert loss[32, False] < loss[32, True]
    skewed = weight.abs()
    both = [quantize_weight(skewed, Format(4, 32, symmetric, True)).loss.relative for symmetric in (True, False)]
    assert both[1] < 0.6 * both[0]


@pytest.mark.parametrize("columns", [33, 64, 100, 129])
def test_the_last_shorter_group_is_fitted_by_itself(columns: int) -> None:
    weight = torch.randn(8, columns)
    weight[:, 32:] *= 1e-3
    packed = quantize_weight(weight, Format(4, 32, True, False))
    for first in range(0, columns, 32):
        part = weight[:, first : first + 32]
        alone = quantize_weight(part.contiguous(), Format(4, 32, True, False))
        both = opened(packed, 4, columns)[:, first : first + 32], opened(alone, 4, part.shape[1])
        torch.testing.assert_close(*both, rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_weights_are_fitted_in_float32(dtype: torch.dtype) -> None:
    weight = torch.randn(8, 64).to(dtype)
    packed, wide = (quantize_weight(value, Format(4, 32, True, True)) for value in (weight, weight.float()))
    assert torch.equal(packed.qweight, wide.qweight)
    assert torch.equal(packed.scales, wide.scales)


def test_scales_are_halves_where_halves_hold_them() -> None:
    weight = torch.randn(4, 64)
    assert quantize_weight(weight, Format(4, 32, True, True)).scales.dtype == torch.float16
    weight[2] *= 1e-6
    assert quantize_weight(weight, Format(4, 32, True, True)).scales.dtype == torch.float32
    assert quantize_weight(torch.randn(4, 64) * 1e7, Format(4, 32, True, True)).scales.dtype == torch.float32


def test_codes_are_chosen_for_the_scales_as_stored() -> None:
    weight = torch.randn(64, 128)
    packed = quantize_weight(weight, Format(8, None, True, True))
    step = packed.scales.double().abs()
    error = (opened(packed, 8, 128) - weight.double()).abs()
    inside = (packed.qweight.flatten(1) > 0) & (packed.qweight.flatten(1) < 255)
    assert (error <= 0.5 * step * (1 + 1e-6))[inside].all()


def test_slices_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(9, 100)
    whole = quantize_weight(weight, Format(4, 32, False, True))
    monkeypatch.setattr(module, "_SLICE_ELEMENTS", 200)
    parts = quantize_weight(weight, Format(4, 32, False, True))
    assert torch.equal(whole.qweight, parts.qweight)
    assert torch.equal(whole.scales, parts.scales)
    assert parts.loss.error == pytest.approx(whole.loss.error, rel=1e-5)


def test_a_transposed_view_is_read_as_it_stands() -> None:
    stored = torch.randn(48, 20)
    form = Format(4, 16, True, True)
    assert torch.equal(
        quantize_weight(stored.t(), form).qweight, quantize_weight(stored.t().contiguous(), form).qweight
    )


def test_the_weight_is_not_written_to() -> None:
    weight = torch.nn.Parameter(torch.randn(8, 40))
    before, version = weight.detach().clone(), weight._version
    quantize_weight(weight, Format(4, 32, True, True))
    quantize_weight_int8(weight, clip_search=True)
    assert torch.equal(weight, before)
    assert weight._version == version


def test_zeros_and_subnormal_numbers() -> None:
    weight = torch.randn(4, 64)
    weight[1] = 0.0
    weight[2, :32] = 1e-42
    packed = quantize_weight(weight, Format(4, 32, True, True))
    found = opened(packed, 4, 64)
    assert (found[1] == 0).all()
    assert (found[2, :32] == 0).all()
    assert found.isfinite().all()
    nothing = quantize_weight(torch.zeros(4, 64), Format(4, 32, True, True))
    assert (opened(nothing, 4, 64) == 0).all()
    assert nothing.loss.relative == 0.0
    assert nothing.loss.sqnr_db == math.inf


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [(0, 0), (3, 63), (2, 66)])
def test_nan_and_infinity_are_refused_by_name(value: float, place: tuple[int, int]) -> None:
    weight = torch.randn(4, 67)
    weight[place] = value
    attempts: list[Callable[[], object]] = [
        lambda: quantize_weight(weight, Format(4, 32, True, True), name="a.b.weight"),
        lambda: quantize_weight(weight, Format(8, None, False, False), name="a.b.weight"),
        lambda: quantize_weight_int8(weight, clip_search=True, name="a.b.weight"),
    ]
    for attempt in attempts:
        with pytest.raises(gw.InputError, match=r"NaN or infinity .*weight 'a.b.weight'"):
            attempt()


# -- channels for integer products -------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [1, 7, 64, 100])
@pytest.mark.parametrize("search", [True, False])
def test_int8_channels(columns: int, search: bool) -> None:
    weight = torch.randn(6, columns)
    weight[3] = 0
    found = quantize_weight_int8(weight, clip_search=search)
    assert (found.qweight.dtype, found.qweight.shape) == (torch.int8, (6, columns))
    assert (found.scales.dtype, found.scales.shape) == (torch.float32, (6,))
    assert (found.scales > 0).all()
    assert found.qweight.abs().max() <= 127
    exact = found.qweight.double() * found.scales.double()[:, None]
    assert (exact[3] == 0).all()
    assert relative(exact, weight) < 0.01
    assert found.loss.relative == pytest.approx(relative(exact, weight), rel=1e-3, abs=1e-7)


# -- the report --------------------------------------------------------------------------------------------------------


def test_losses_are_reported_worst_first() -> None:
    losses = {"fine": Loss(1e-4, 1.0), "bad": Loss(1e-2, 1.0), "zero": Loss(0.0, 0.0), "fair": Loss(1e-3, 1.0)}
    entries = report_entries(losses)
    assert entries["least_exact"] == "bad 20.0 dB, fair 30.0 dB, fine 40.0 dB"
    assert entries["weights"]["bad"] == {"relative": pytest.approx(0.1), "sqnr_db": pytest.approx(20.0)}
    assert entries["weights"]["zero"] == {"relative": 0.0, "sqnr_db": math.inf}


def test_loss_adds_up() -> None:
    exact = torch.randn(40, 8)
    moved = exact + 0.01 * torch.randn(40, 8)
    loss = Loss()
    for part in (slice(0, 10), slice(10, 40)):
        loss.add(moved[part].clone(), exact[part])
    assert loss.relative == pytest.approx(relative(moved.double(), exact), rel=1e-4)
