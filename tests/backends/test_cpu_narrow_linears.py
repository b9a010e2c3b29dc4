"""Linears of few outputs: their weights are read as they are stored, in sums that every instruction set takes alike."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from graphwright.backends.cpu import features, native_status
from graphwright.backends.cpu.kernels.float_linear import FloatLinear, pack_floats

pytestmark = pytest.mark.skipif(not native_status().available, reason=native_status().message)

UNIT = 2.0**-24
COLUMNS = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 48, 100, 1029)
OUTPUTS = (1, 2, 3, 4, 7, 8, 15, 31, 32)


def isas() -> list[str]:
    return [isa.name for isa in features().instruction_sets if isa.usable]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def check(outputs: int, columns: int, rows: int, *, bfloat16: bool) -> None:
    weight, bias, x = random(outputs, columns), random(outputs, seed=1), random(rows, columns, seed=2)
    if bfloat16:
        weight = weight.bfloat16()
    residual = random(rows, outputs, seed=3)
    packed = pack_floats(weight, bfloat16=bfloat16)
    assert packed.narrow
    results = [FloatLinear(packed, isa, bias)(x, None, residual) for isa in isas()]
    assert all(torch.equal(found, results[0]) for found in results), "instruction sets differ"
    wanted = x.double() @ weight.double().t() + bias.double() + residual.double()
    # A sum of 16 parts, each a chain of fused multiply-adds, added in halves; then the bias and the residual.
    roundings = math.ceil(columns / 16) + 4 + 2
    terms = x.double().abs() @ weight.double().abs().t() + bias.double().abs() + residual.double().abs()
    error = roundings * UNIT / (1 - roundings * UNIT)
    assert ((results[0].double() - wanted).abs() <= error * terms).all()


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("columns", COLUMNS)
def test_columns(columns: int, bfloat16: bool) -> None:
    for outputs in (1, 8, 13):
        for rows in (0, 1, 2, 5):
            check(outputs, columns, rows, bfloat16=bfloat16)


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("outputs", OUTPUTS)
def test_outputs(outputs: int, bfloat16: bool) -> None:
    for rows in (1, 3, 4, 7, 33):
        check(outputs, 50, rows, bfloat16=bfloat16)


def test_more_outputs_are_cut_into_panels() -> None:
    assert pack_floats(random(32, 5)).narrow
    assert not pack_floats(random(33, 5)).narrow


def test_what_was_packed_stays_when_the_weight_is_trained() -> None:
    weight, x = random(3, 20), random(2, 20)
    kernel = FloatLinear(pack_floats(weight), isas()[-1])
    before = kernel(x)
    weight.zero_()
    assert torch.equal(kernel(x), before)


def test_nothing_beyond_the_last_column_is_read() -> None:
    """A weight and rows whose neighbours in memory are NaN."""
    around = torch.full((10, 37), math.nan)
    around[1, :] = 1.0
    for isa in isas():
        kernel = FloatLinear(pack_floats(around[1:2]), isa)
        assert kernel(around[1:2].clone()).item() == 37.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_stay_in_their_row_and_output(bad: float) -> None:
    weight, x = torch.ones(9, 40), torch.ones(6, 40)
    weight[3, 39], x[4, 17] = bad, bad
    for isa in isas():
        found = FloatLinear(pack_floats(weight), isa)(x)
        touched = torch.zeros(6, 9, dtype=torch.bool)
        touched[4, :], touched[:, 3] = True, True
        assert torch.equal(found.isfinite(), ~touched)


@pytest.mark.parametrize("rows", [1, 3, 9, 200])
def test_the_number_of_threads_changes_nothing(rows: int) -> None:
    weight, x = random(32, 9001), random(rows, 9001)
    kernel, before, found = FloatLinear(pack_floats(weight), isas()[-1]), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(kernel(x))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(each, found[0]) for each in found)


def test_the_extension_refuses_what_does_not_fit() -> None:
    from graphwright.backends.cpu import _native

    good = np.zeros(3 * 5 * 4, np.uint8)
    _native.NarrowLinear("scalar", 3, 5, False, good, None)
    with pytest.raises(ValueError, match="too many outputs"):
        _native.NarrowLinear("scalar", 33, 5, False, np.zeros(33 * 5 * 4, np.uint8), None)
    with pytest.raises(ValueError, match="wrong size"):
        _native.NarrowLinear("scalar", 3, 5, True, good, None)
    with pytest.raises(ValueError, match="bias"):
        _native.NarrowLinear("scalar", 3, 5, False, good, np.zeros(4, np.float32))
