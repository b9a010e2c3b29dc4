"""GPTQ against the paper's equations, and against rounding to nearest."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

import graphwright as gw
from graphwright.ir.ops.quantization import dequantize
from graphwright.passes.quantization.formats import Format
from graphwright.passes.quantization.rounding.base import Codes
from graphwright.passes.quantization.rounding.descent import dense, descend
from graphwright.passes.quantization.rounding.gptq import Gptq, gptq
from graphwright.passes.quantization.rounding.order import by_column, in_groups
from graphwright.passes.quantization.weights import (
    ChannelWeight,
    PackedWeight,
    pack_codes,
    quantize_weight,
    quantize_weight_int8,
)


def opened(packed: PackedWeight | ChannelWeight, bits: int, columns: int) -> torch.Tensor:
    assert isinstance(packed, PackedWeight)
    return dequantize(packed.qweight, packed.scales, packed.zero_points, bits, columns, torch.float64)


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found - exact.double()).norm() / exact.double().norm())


def correlated(rows: int, columns: int) -> torch.Tensor:
    """Inputs whose features move together, as those of a real layer do."""
    return torch.randn(rows, columns // 4) @ torch.randn(columns // 4, columns) + 0.3 * torch.randn(rows, columns)


def test_gptq_is_the_algorithm_of_the_paper() -> None:
    """Against column-by-column elimination on the explicit inverse, as in the paper's equations 2 and 3."""
    x, weight = correlated(256, 24), torch.randn(5, 24)
    moment = x.T @ x
    scale = weight.abs().amax(-1) / 7

    class Fixed(Format):
        def fit(self, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
            return scale, torch.full((5,), 8.0)

    found = gptq(weight, moment, Fixed(4, None, True, False))
    codes, scales = found.codes, found.scales
    hessian = moment.double().numpy()
    hessian = hessian + 0.01 * np.mean(np.diag(hessian)) * np.eye(24)
    inverse, work = np.linalg.inv(hessian), weight.double().numpy().copy()
    expected = np.zeros((5, 24))
    for column in range(24):
        steps = scale.double().numpy()
        expected[:, column] = np.clip(np.rint(work[:, column] / steps), -8, 7)
        error = (work[:, column] - expected[:, column] * steps) / inverse[column, column]
        work[:, column:] -= np.outer(error, inverse[column, column:])
        inverse -= np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    assert torch.equal(scales[:, 0], scale)
    agree = (codes.double().numpy() - 8 == expected).mean()
    assert agree >= 0.99  # float32 against float64: a value halfway between two codes may fall either way


@pytest.mark.parametrize(("group", "symmetric"), [(32, True), (32, False), (None, True), (48, True)])
def test_gptq_keeps_outputs_better_than_rounding_to_nearest(group: int | None, symmetric: bool) -> None:
    x, weight = correlated(512, 160), torch.randn(40, 160)
    form = Format(4, group, symmetric, True)
    near = quantize_weight(weight, form)
    better = pack_codes(gptq(weight, x.T @ x, form), form)
    exact = x.double() @ weight.double().T
    errors = [relative(x.double() @ opened(packed, 4, 160).T, exact) for packed in (near, better)]
    assert errors[1] < 0.75 * errors[0]
    assert better.loss.relative == pytest.approx(errors[1], rel=0.01)


def test_gptq_for_int8_channels() -> None:
    x, weight = correlated(512, 64), torch.randn(16, 64)
    exact = x.double() @ weight.double().T
    near = quantize_weight_int8(weight, clip_search=True)
    form = Format(8, None, True, True, integer_products=True)
    better = pack_codes(gptq(weight, x.T @ x, form), form)
    errors = [relative(x.double() @ found.dense().double().T, exact) for found in (near, better)]
    assert errors[1] < 0.8 * errors[0]
    assert better.loss.relative == pytest.approx(errors[1], rel=0.02)
    assert better.qweight.to(torch.int16).abs().max() <= 127


def test_features_that_never_fire_are_rounded_to_nearest() -> None:
    x, weight = correlated(128, 32), torch.randn(4, 32)
    x[:, 5] = 0
    form = Format(4, None, True, False)
    packed = pack_codes(gptq(weight, x.T @ x, form), form)
    scale = packed.scales.double()[:, 0]
    nearest = (weight[:, 5].double() / scale).round().clamp(-8, 7) * scale
    assert torch.equal(opened(packed, 4, 32)[:, 5], nearest)


@pytest.mark.parametrize(
    ("moment", "message"),
    [
        (torch.zeros(8, 8), "all zero"),
        (torch.full((8, 8), float("nan")), "hold NaN"),
        (torch.eye(7), "second moment is"),
        (-torch.eye(8) + 2 * torch.ones(8, 8), "singular"),
    ],
)
def test_second_moments_that_cannot_be_used(moment: torch.Tensor, message: str) -> None:
    with pytest.raises(gw.InputError, match=message):
        gptq(torch.randn(4, 8), moment, Format(4, None, True, True))


def test_gptq_fits_a_group_with_the_updates_it_has_had() -> None:
    """A group larger than the block of columns updated at once."""
    x, weight = correlated(400, 200), torch.randn(8, 200)
    for group in (64, 192, 200):
        form = Format(4, group, True, True)
        packed = pack_codes(gptq(weight, x.T @ x, form), form)
        near = quantize_weight(weight, form)
        exact = x.double() @ weight.double().T
        errors = [relative(x.double() @ opened(found, 4, 200).T, exact) for found in (near, packed)]
        assert errors[1] < 0.75 * errors[0]


@pytest.mark.parametrize("damping", [0.0, -1.0, float("nan"), 10.0])
def test_damping_must_be_positive(damping: float) -> None:
    with pytest.raises(gw.InputError, match="damping"):
        gw.Gptq(damping=damping)


@pytest.mark.parametrize("option", [{"sweeps": -1}, {"sweeps": True}, {"block": 0}, {"static_groups": True}])
def test_options_that_mean_nothing(option: dict[str, Any]) -> None:
    with pytest.raises(gw.InputError, match=next(iter(option))):
        gw.Gptq(**option)


# -- orders ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(("count", "group"), [(200, 16), (200, 48), (384, 192), (100, 100), (7, 2), (1, 2)])
def test_every_column_is_rounded_once_and_groups_stay_together(count: int, group: int, act_order: bool) -> None:
    importance = torch.rand(count)
    order = in_groups(importance, group, 128, act_order=act_order)
    assert sorted(order.columns.tolist()) == list(range(count))
    assert order.places is not None
    done: list[int] = []
    for span in order.spans:
        assert span.stop - span.start <= 128
        for start, stop, index in span.pieces:
            assert span.start <= start < stop <= span.stop
            assert set((order.columns[start:stop] // group).tolist()) == {index}
            done += range(stop - 1, start - 1, -1)
            assert order.places[index][0] <= start
            assert order.places[index][1] >= stop
            assert order.places[index][0] >= span.start or span.pieces[0][2] == index
    assert done == list(range(count - 1, -1, -1))
    rounded = order.columns.flip(0)
    if not act_order:
        assert rounded.tolist() == list(range(count))
        return
    sums = [float(importance[rounded[place : place + 1] // group * group :][:group].sum()) for place in range(count)]
    short = count % group
    assert short or all(a >= b - 1e-5 for a, b in itertools.pairwise(sums))


def test_columns_by_importance_alone() -> None:
    order = by_column(torch.tensor([0.1, 3.0, 2.0, 5.0, 0.2]), 2)
    assert order.columns.flip(0).tolist() == [3, 1, 2, 4, 0]
    assert order.places is None
    assert [(span.start, span.stop) for span in order.spans] == [(3, 5), (1, 3), (0, 1)]


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize(("group", "block"), [(16, 128), (16, 24), (192, 64), (None, 128)])
def test_act_order_against_the_paper(static: bool, group: int | None, block: int) -> None:
    """In float64, column by column, with the grids that were found."""
    x, weight = correlated(600, 200), torch.randn(6, 200)
    form = Format(4, group, True, True)
    options = Gptq(act_order=True, static_groups=static, block=block)
    found = gptq(weight, x.T @ x, form, options=options)
    size = group or 200
    importance = (x * x).sum(0)
    order = by_column(importance, block) if static else in_groups(importance, size, block, act_order=True)
    hessian = (x.T @ x).double().numpy()
    hessian = hessian + 0.01 * np.mean(np.diag(hessian)) * np.eye(200)
    arranged = order.columns.flip(0).numpy()
    inverse, work = np.linalg.inv(hessian[np.ix_(arranged, arranged)]), weight.double().numpy()[:, arranged].copy()
    same = 0
    for place, column in enumerate(arranged):
        steps = found.scales[:, column // size].double().numpy()
        code = np.clip(np.rint(work[:, place] / steps), -8, 7)
        same += int((code == found.codes[:, column].double().numpy() - 8).sum())
        # On with the codes that were found: one tie that falls the other way changes all after it.
        value = (found.codes[:, column].double().numpy() - 8) * steps
        work[:, place:] -= np.outer((work[:, place] - value) / inverse[place, place], inverse[place, place:])
        inverse -= np.outer(inverse[:, place], inverse[place]) / inverse[place, place]
    assert same >= 0.998 * weight.numel()


def test_a_weight_in_half_precision_and_one_stored_turned() -> None:
    x, weight = correlated(300, 64), torch.randn(64, 24).bfloat16()
    form = Format(4, 32, False, True)
    turned, straight = gptq(weight.t(), x.T @ x, form), gptq(weight.t().float().contiguous(), x.T @ x, form)
    assert torch.equal(turned.codes, straight.codes)
    assert torch.equal(turned.zeros, straight.zeros)


def test_nothing_given_is_changed() -> None:
    x, weight = correlated(300, 64), torch.randn(24, 64)
    moment = x.T @ x
    before = moment.clone(), weight.clone()
    gptq(weight, moment, Format(3, 32, True, True), options=Gptq(act_order=True, sweeps=2))
    assert torch.equal(moment, before[0])
    assert torch.equal(weight, before[1])


def test_moments_that_float32_cannot_factor() -> None:
    """One direction that outweighs all others by far: float64 is taken, and the outputs are as good as elsewhere."""
    torch.manual_seed(5)
    x, weight = torch.randn(400, 256) + 3e4 * torch.rand(256), torch.randn(12, 256)
    moment = x.double().T @ x.double()
    single = moment.float() / moment.diagonal().mean().float()
    assert int(torch.linalg.cholesky_ex(single + 1e-9 * torch.eye(256))[1]) > 0
    form = Format(4, 64, True, True)
    found = gptq(weight, moment, form, options=Gptq(damping=1e-9))
    exact = x.double() @ weight.double().T
    errors = [
        relative(x.double() @ each.double().T, exact)
        for each in (dense(found, form), quantize_weight(weight, form).dense())
    ]
    assert errors[0] < 0.3 * errors[1]


# -- coordinate descent ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "group", "symmetric"), [(2, 32, True), (3, None, True), (3, 48, False), (4, 64, True)]
)
def test_sweeps_take_error_away(bits: int, group: int | None, symmetric: bool) -> None:
    x, weight = correlated(512, 128), torch.randn(40, 128)
    form = Format(bits, group, symmetric, True)
    losses = [gptq(weight, x.T @ x, form, options=Gptq(sweeps=sweeps)).loss.relative for sweeps in (0, 1, 6)]
    assert losses[2] < losses[1] < 0.995 * losses[0]


def test_a_sweep_ends_where_no_code_can_be_better() -> None:
    """Every single change of a code makes the damped error larger, by exhaustive trial."""
    x, weight = correlated(200, 16), torch.randn(3, 16)
    moment, form = x.T @ x, Format(2, 8, True, True)
    start = gptq(weight, moment, form)
    found = descend(weight, moment, start, form, sweeps=60, damping=0.01)
    damped = moment.double() + 0.01 * moment.diagonal().double().mean() * torch.eye(16, dtype=torch.float64)

    def cost(codes: torch.Tensor) -> torch.Tensor:
        error = weight.double() - dense(Codes(codes, found.scales, found.zeros), form).double()
        return ((error @ damped) * error).sum(1)

    best = cost(found.codes)
    for column in range(16):
        for code in range(4):
            other = found.codes.clone()
            other[:, column] = code
            assert bool((cost(other) >= best * (1 - 1e-5)).all())
