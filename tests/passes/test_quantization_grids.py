"""Grids of integers fitted to groups of weights: what rounding on them costs, as properties."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphwright.passes.quantization.grids import clip_ratios, fit_grid, round_to_grid

GROUPS = (1, 2, 3, 7, 8, 16, 31, 32, 33, 128, 1024)


@st.composite
def groups(draw: st.DrawFn) -> torch.Tensor:
    """Groups of weights: normal, heavy-tailed, one-sided, sparse, constant, of any size of number."""
    width, seed = draw(st.sampled_from(GROUPS)), draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(4, width, generator=generator)
    kind = draw(st.sampled_from(("normal", "heavy", "positive", "negative", "sparse", "constant", "zero")))
    if kind == "heavy":
        weights = weights**5
    elif kind == "positive":
        weights = weights.abs()
    elif kind == "negative":
        weights = -weights.abs()
    elif kind == "sparse":
        weights = weights * (torch.rand(4, width, generator=generator) < 0.2)
    elif kind == "constant":
        weights = weights[:, :1].expand(4, width).clone()
    elif kind == "zero":
        weights = weights * 0
    return weights * 10.0 ** draw(st.integers(-30, 30))


bits = st.sampled_from((2, 3, 4, 5, 8))


def rounded(weights: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int) -> torch.Tensor:
    """Weights after rounding, in float64."""
    codes = round_to_grid(weights, scale, zero, bits).double()
    return (codes - zero.double().unsqueeze(-1)) * scale.double().unsqueeze(-1)


def squared_error(weights: torch.Tensor, grid: tuple[torch.Tensor, torch.Tensor], bits: int) -> torch.Tensor:
    return (rounded(weights, *grid, bits) - weights.double()).square().sum(-1)


@given(groups(), bits, st.booleans(), st.booleans())
def test_grids_are_well_formed(weights: torch.Tensor, bits: int, symmetric: bool, search: bool) -> None:
    scale, zero = fit_grid(weights, bits=bits, symmetric=symmetric, clip_search=search)
    assert scale.isfinite().all()
    assert (scale != 0).all()
    assert torch.equal(zero, zero.round())
    assert ((zero >= 0) & (zero < 2**bits)).all()
    if symmetric:
        assert (zero == 2 ** (bits - 1)).all()
    codes = round_to_grid(weights, scale, zero, bits)
    assert ((codes >= 0) & (codes <= 2**bits - 1) & (codes == codes.round())).all()


@given(groups(), bits, st.booleans(), st.booleans())
def test_zero_is_exact(weights: torch.Tensor, bits: int, symmetric: bool, search: bool) -> None:
    weights[:, 0] = 0
    found = rounded(weights, *fit_grid(weights, bits=bits, symmetric=symmetric, clip_search=search), bits)
    assert (found[:, 0] == 0).all()


@given(groups(), bits)
def test_asymmetric_grids_of_the_full_range_miss_by_half_a_step(weights: torch.Tensor, bits: int) -> None:
    scale, zero = fit_grid(weights, bits=bits, symmetric=False, clip_search=False)
    error = (rounded(weights, scale, zero, bits) - weights.double()).abs()
    # The zero point is rounded, which may push either end half a step off the grid: that is clipped, by no more.
    assert (error <= 0.5 * scale.double().unsqueeze(-1) * (1 + 1e-5)).all()


@given(groups(), bits, st.booleans())
def test_what_is_not_clipped_moves_by_half_a_step(weights: torch.Tensor, bits: int, symmetric: bool) -> None:
    scale, zero = fit_grid(weights, bits=bits, symmetric=symmetric, clip_search=True)
    codes = round_to_grid(weights, scale, zero, bits)
    error = (rounded(weights, scale, zero, bits) - weights.double()).abs()
    inside = (codes > 0) & (codes < 2**bits - 1)
    limit = 0.5 * scale.double().abs().unsqueeze(-1) * (1 + 1e-5)
    assert (error <= limit)[inside].all()


@given(groups(), bits)
def test_symmetric_full_range_puts_the_largest_magnitude_on_the_lowest_code(weights: torch.Tensor, bits: int) -> None:
    scale, zero = fit_grid(weights, bits=bits, symmetric=True, clip_search=False)
    codes = round_to_grid(weights, scale, zero, bits)
    largest = weights.abs().argmax(-1, keepdim=True)
    chosen = codes.gather(-1, largest).squeeze(-1)
    alive = weights.abs().amax(-1) > 0
    assert (chosen[alive] == 0).all()
    exact = rounded(weights, scale, zero, bits).gather(-1, largest)
    torch.testing.assert_close(exact, weights.double().gather(-1, largest), rtol=1e-6, atol=0)


@given(groups(), bits, st.booleans())
def test_the_search_is_never_worse_than_the_full_range(weights: torch.Tensor, bits: int, symmetric: bool) -> None:
    full = squared_error(weights, fit_grid(weights, bits=bits, symmetric=symmetric, clip_search=False), bits)
    found = squared_error(weights, fit_grid(weights, bits=bits, symmetric=symmetric, clip_search=True), bits)
    # The search adds squares up in float32, so it cannot tell apart what differs by less than that rounds.
    noise = 1e-5 * weights.double().square().sum(-1)
    assert (found <= full + noise).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, 128, 1024])
@pytest.mark.parametrize("tail", [1.0, 2.0])
def test_the_search_comes_near_an_exhaustive_one(symmetric: bool, group: int, tail: float) -> None:
    weights = torch.randn(64, group)
    weights = weights.sign() * weights.abs() ** tail
    every = [1.15 - 0.01 * index for index in range(100)]
    best = squared_error(
        weights, fit_grid(weights, bits=4, symmetric=symmetric, clip_search=True, ratios=every), 4
    ).sum()
    full = squared_error(weights, fit_grid(weights, bits=4, symmetric=symmetric, clip_search=False), 4).sum()
    found = squared_error(weights, fit_grid(weights, bits=4, symmetric=symmetric, clip_search=True), 4).sum()
    assert found <= 1.03 * best
    assert found <= 0.95 * full


@given(groups(), st.sampled_from((4, 8)), st.booleans(), st.booleans())
def test_a_weight_on_a_grid_stays_where_it_is(weights: torch.Tensor, bits: int, symmetric: bool, search: bool) -> None:
    scale, zero = fit_grid(weights, bits=bits, symmetric=symmetric, clip_search=search)
    once = rounded(weights, scale, zero, bits).float()
    codes = round_to_grid(once, scale, zero, bits)
    assert torch.equal(codes, round_to_grid(weights, scale, zero, bits))


def test_quantising_again_changes_nothing() -> None:
    weights = torch.randn(200, 64)
    for symmetric in (True, False):
        for bits in (4, 8):
            first = fit_grid(weights, bits=bits, symmetric=symmetric, clip_search=False)
            once = rounded(weights, *first, bits).float()
            again = fit_grid(once, bits=bits, symmetric=symmetric, clip_search=False)
            assert torch.equal(round_to_grid(once, *again, bits), round_to_grid(weights, *first, bits))
    searched = fit_grid(weights, bits=4, symmetric=True, clip_search=True)
    once = rounded(weights, *searched, 4).float()
    twice = rounded(once, *fit_grid(once, bits=4, symmetric=True, clip_search=True), 4)
    torch.testing.assert_close(twice.float(), once, rtol=1e-5, atol=1e-6)


@given(groups(), st.booleans(), st.booleans(), st.integers(-20, 20))
def test_powers_of_two_scale_the_grid_and_leave_the_codes(
    weights: torch.Tensor, symmetric: bool, search: bool, power: int
) -> None:
    size = weights.abs().amax(-1)
    usual = (size == 0) | ((size > 1e-28) & (size < 1e28))
    weights = weights[usual]
    scale, zero = fit_grid(weights, bits=4, symmetric=symmetric, clip_search=search)
    other, same = fit_grid(weights * 2.0**power, bits=4, symmetric=symmetric, clip_search=search)
    assert torch.equal(zero, same)
    alive = weights.abs().amax(-1) > 0
    assert torch.equal((scale * 2.0**power)[alive], other[alive])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("search", [True, False])
@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-40, -1e-38])
def test_what_is_too_small_for_a_scale_becomes_zero(symmetric: bool, search: bool, value: float) -> None:
    weights = torch.full((2, 16), value)
    scale, zero = fit_grid(weights, bits=4, symmetric=symmetric, clip_search=search)
    assert scale.tolist() == [1.0, 1.0]
    assert (rounded(weights, scale, zero, 4) == 0).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_largest_numbers_there_are(symmetric: bool) -> None:
    weights = torch.linspace(-1, 1, 32).reshape(1, 32) * 3e38
    scale, zero = fit_grid(weights, bits=4, symmetric=symmetric, clip_search=True)
    error = (rounded(weights, scale, zero, 4) - weights.double()).abs().max()
    assert error <= 1.01 * scale.abs().max()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("search", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_shows_in_the_scale_of_its_group_only(symmetric: bool, search: bool, value: float) -> None:
    weights = torch.randn(3, 16)
    weights[1, 5] = value
    scale, _ = fit_grid(weights, bits=4, symmetric=symmetric, clip_search=search)
    assert scale.isfinite().tolist() == [True, False, True]


def test_importance_moves_the_grid_towards_the_columns_that_matter() -> None:
    weights = torch.randn(64, 32)
    weights[:, 0] = 8.0  # an outlier of no importance
    importance = torch.ones(32)
    importance[0] = 1e-6
    plain = fit_grid(weights, bits=4, symmetric=True, clip_search=True)
    weighed = fit_grid(weights, bits=4, symmetric=True, clip_search=True, importance=importance, ratios=(1.0, 0.5))
    error = [(rounded(weights, *grid, 4) - weights)[:, 1:].square().sum() for grid in (plain, weighed)]
    assert error[1] < 0.6 * error[0]


def test_channels_for_integer_products_leave_the_lowest_code_out() -> None:
    weights = torch.randn(8, 64)
    scale, zero = fit_grid(weights, bits=8, symmetric=True, clip_search=False, full_range=False)
    assert (scale > 0).all()
    codes = round_to_grid(weights, scale, zero, 8, lowest=1.0) - zero.unsqueeze(-1)
    assert codes.abs().max() == 127
    error = (codes * scale.unsqueeze(-1) - weights).abs()
    assert (error <= 0.5 * scale.unsqueeze(-1) * (1 + 1e-5)).all()


def test_wide_groups_are_searched_further_down() -> None:
    assert min(clip_ratios(4, 4096)) < min(clip_ratios(4, 128)) < min(clip_ratios(8, 128))
    for bits, group in ((4, 32), (4, 4096), (8, 128)):
        assert 1.0 in clip_ratios(bits, group)
