"""HQQ: grids without data."""

from __future__ import annotations

import pytest
import torch

import graphwright as gw
from graphwright.passes.quantization.formats import Format
from graphwright.passes.quantization.rounding.descent import dense
from graphwright.passes.quantization.rounding.hqq import Hqq


def heavy(rows: int, columns: int) -> torch.Tensor:
    """Weights with outliers."""
    generator = torch.Generator().manual_seed(2)
    return torch.randn(rows, columns, generator=generator) * torch.rand(rows, columns, generator=generator).pow(-0.4)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(("group", "symmetric"), [(32, True), (32, False), (None, False), (48, False)])
@pytest.mark.parametrize("fit_scale", [False, True])
def test_no_group_is_worse_than_nearest(bits: int, group: int | None, symmetric: bool, fit_scale: bool) -> None:
    weight = heavy(20, 160) / 100
    form = Format(bits, group, symmetric, True)
    found = Hqq(fit_scale=fit_scale).codes(weight, form)
    assert int(found.codes.max()) < 2**bits
    assert torch.equal(found.zeros, found.zeros.round().clamp(0, 2**bits - 1))
    size = form.columns_per_group(160)
    for index, piece in enumerate(weight.split(size, dim=1)):
        scale, zero = form.fit(piece, clip_search=fit_scale)
        near = (form.values(form.round(piece, scale, zero), scale, zero) - piece).square().sum(1)
        own = slice(index * size, (index + 1) * size)
        # Errors are small beside 1 / beta, so the objective is the squared error.
        error = (dense(found, form)[:, own] - piece).square().sum(1)
        assert bool((error <= near * (1 + 1e-4)).all())
    error = float((dense(found, form) - weight).norm() / weight.norm())
    assert found.loss.relative == pytest.approx(error, rel=1e-4)


def test_zero_points_pay_where_weights_lie_to_one_side() -> None:
    weight = heavy(16, 128).abs()
    plain = Hqq().codes(weight, Format(3, 64, True, True)).loss.relative
    assert Hqq().codes(weight, Format(3, 64, False, True)).loss.relative < 0.7 * plain


def test_a_small_norm_lets_outliers_go() -> None:
    """With weights as large as ``1 / beta`` the norm tells: most weights come closer, the largest are given up."""
    weight = heavy(64, 128) * 3
    form = Format(3, 64, False, True)
    errors = [
        (dense(Hqq(norm=norm, beta=beta, fit_scale=True).codes(weight, form), form) - weight).abs()
        for norm, beta in ((0.5, 5.0), (1.0, 1e-3))
    ]
    assert float(errors[0].median()) < 0.97 * float(errors[1].median())
    assert float(errors[0].max()) > float(errors[1].max())


def test_zeros_and_the_pass() -> None:
    codes = Hqq().codes(torch.zeros(4, 32), Format(4, 16, False, True))
    assert not dense(codes, Format(4, 16, False, True)).any()
    program = gw.trace(torch.nn.Linear(32, 8), torch.randn(2, 32))
    assert gw.QuantizeLinears(bits=4, group_size=16, symmetric=False, rounding="hqq")(program)
    gw.verify(program)


@pytest.mark.parametrize("option", [{"norm": 0.0}, {"norm": 1.5}, {"beta": -1.0}, {"growth": 0.5}, {"steps": 0}])
def test_bad_options(option: dict[str, float]) -> None:
    with pytest.raises(gw.InputError, match=next(iter(option))):
        gw.Hqq(**option)
