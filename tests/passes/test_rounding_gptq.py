"""GPTQ against the paper's equations, and against rounding to nearest."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import graphwright as gw
from graphwright.ir.ops.quantization import dequantize
from graphwright.passes.quantization.formats import Format
from graphwright.passes.quantization.rounding.gptq import gptq
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
