"""Norms against their references, at the tails, with gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tests.backends.triton.oracle import DTYPES, check, gradients, random, same_where_not_finite
from torch.nn import functional

from graphwright.backends.triton.kernels.norms import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from graphwright.ir.errors import BackendError
from graphwright.ir.ops.normalization import rms_norm as reference

SHAPES = [(1, 1), (3, 2), (2, 3, 7), (17, 9), (1, 33), (0, 5), (2, 128), (5, 130)]


def layers(x: Any, weight: Any, bias: Any, eps: float = 1e-5) -> torch.Tensor:
    return functional.layer_norm(x, x.shape[-1:], weight, bias, eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight, bias = (
        random(*size, seed=seed, dtype=dtype) for seed, size in enumerate((shape, shape[-1:], shape[-1:]))
    )
    check(rms_norm(x, weight, 1e-5), reference(x.double(), weight.double(), 1e-5), dtype)
    check(rms_norm(x, None, 1e-5), reference(x.double(), None, 1e-5), dtype)
    check(layer_norm(x, weight, bias, 1e-5), layers(x.double(), weight.double(), bias.double()), dtype)
    check(layer_norm(x, weight, None, 1e-5), layers(x.double(), weight.double(), None), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_sum_is_rounded_as_it_is_stored(dtype: torch.dtype) -> None:
    x, residual, weight = random(5, 33, dtype=dtype), random(5, 33, seed=1, dtype=dtype), random(33, dtype=dtype)
    for y, total in (add_rms_norm(x, residual, weight, 1e-6), add_layer_norm(x, residual, weight, weight, 1e-6)):
        # The interpreter cuts bfloat16 off where a GPU rounds it.
        check(total, x.double() + residual.double(), dtype, roundings=1)
        assert y.dtype == dtype
    check(add_rms_norm(x, residual, weight, 1e-6)[0], reference((x + residual).double(), weight.double(), 1e-6), dtype)


def test_rows_of_any_stride() -> None:
    base = random(7, 3, 40)
    for x in (base[:, 1, 3:36], base[::2, :, 1:8], base.transpose(1, 2)):
        check(rms_norm(x, None, 1e-5), reference(x.double(), None, 1e-5), torch.float32)


@pytest.mark.parametrize("shape", [(1, 5), (300, 7), (2, 3, 65)], ids=str)
def test_gradients(shape: tuple[int, ...]) -> None:
    x, weight, bias, slope = (
        random(*shape),
        random(shape[-1], seed=1),
        random(shape[-1], seed=2),
        random(*shape, seed=3),
    )
    wide = [each.double() for each in (x, weight, bias)]
    pairs = [
        (
            gradients(lambda x, w: rms_norm(x, w, 1e-5), (x, weight), slope),
            gradients(lambda x, w: reference(x, w, 1e-5), wide[:2], slope.double()),
        ),
        (
            gradients(lambda x, w, b: layer_norm(x, w, b, 1e-5), (x, weight, bias), slope),
            gradients(layers, wide, slope.double()),
        ),
    ]
    for found, wanted in pairs:
        for a, b in zip(found, wanted, strict=True):
            check(a, b, torch.float32, roundings=20)


def test_gradients_of_norm_and_sum_together() -> None:
    x, residual, weight = random(4, 9), random(4, 9, seed=1), random(9, seed=2)

    def ours(x: Any, residual: Any, weight: Any) -> torch.Tensor:
        y, total = add_rms_norm(x, residual, weight, 1e-5)
        return y * 2 + total * total

    def theirs(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return reference(x + residual, weight, 1e-5) * 2 + (x + residual) ** 2

    slope = random(4, 9, seed=3)
    wanted = gradients(theirs, [each.double() for each in (x, residual, weight)], slope.double())
    for a, b in zip(gradients(ours, (x, residual, weight), slope), wanted, strict=True):
        check(a, b, torch.float32, roundings=20)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite(bad: float) -> None:
    x, weight = random(3, 9), random(9, seed=1)
    x[1, 4] = bad
    same_where_not_finite(rms_norm(x, weight, 1e-5), reference(x.double(), weight.double(), 1e-5))
    same_where_not_finite(layer_norm(x, weight, weight, 1e-5), layers(x.double(), weight.double(), weight.double()))


def test_tensors_elsewhere_are_refused() -> None:
    with pytest.raises(BackendError, match="is on meta, the kernel runs on cpu"):
        rms_norm(torch.empty(2, 3, device="meta"), None, 1e-5)
