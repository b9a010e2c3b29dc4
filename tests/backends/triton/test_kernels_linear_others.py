"""INT8, FP8 and block-sparse linears against their references."""

from __future__ import annotations

import math

import pytest
import torch
from tests.backends.triton.oracle import DTYPES, check, random
from torch.nn import functional

from graphwright.backends.triton.kernels.epilogue import Epilogue
from graphwright.backends.triton.kernels.linear_fp8 import linear_fp8, round_fp8
from graphwright.backends.triton.kernels.linear_int8 import multiply_codes, round_rows, sums_of
from graphwright.backends.triton.kernels.sparse_linear import BlockWeight, fused_linear_blocks
from graphwright.backends.triton.kernels.two_of_four import two_of_four
from graphwright.backends.triton.launching import recorded
from graphwright.ir.errors import BackendError
from graphwright.ir.ops.quantization import linear_int8_dynamic, linear_int8_static, pack
from graphwright.ir.ops.rounded_activations import linear_nbits_dynamic


def weight_codes(out: int, columns: int) -> torch.Tensor:
    return torch.randint(-127, 128, (out, columns), generator=torch.Generator().manual_seed(out), dtype=torch.int8)


@pytest.mark.parametrize(("rows", "columns", "out"), [(1, 1, 1), (3, 33, 5), (17, 130, 70), (0, 8, 4)])
def test_int8(rows: int, columns: int, out: int) -> None:
    x, weight, scales, bias = random(rows, columns), weight_codes(out, columns), random(out).abs(), random(out, seed=1)
    found = multiply_codes(round_rows(x), weight, scales, sums_of(weight), Epilogue(bias=bias), torch.float32)
    check(found, linear_int8_dynamic(x, weight, scales, bias, "per_token"), roundings=8)
    steps = random(columns, seed=2).abs() / 30 + 0.01
    codes = round_rows(x, steps=steps, zero_point=100)
    found = multiply_codes(codes, weight, scales, sums_of(weight), Epilogue(bias=bias), torch.float32)
    check(found, linear_int8_static(x, weight, scales, bias, steps, 100), roundings=8)


def test_int8_with_scales_of_groups() -> None:
    rows, groups, size, out = 5, 3, 32, 20
    x, scales = random(rows, groups * size), random(out, groups).abs()
    weight = weight_codes(out, groups * size)
    packed = pack((weight.to(torch.int16) + 128).to(torch.uint8), 8, size, None)
    wanted = linear_nbits_dynamic(x, packed, scales, None, None, 8, size, 8, "per_group")
    codes = round_rows(x, group_size=size)
    found = multiply_codes(codes, weight, scales, sums_of(weight), Epilogue(), torch.float32)
    check(found, wanted, roundings=8)
    with pytest.raises(BackendError, match="60 scales where activations want 20"):
        multiply_codes(round_rows(x), weight, scales, sums_of(weight), Epilogue(), torch.float32)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_int8_rows_that_are_not_finite(bad: float) -> None:
    x, weight, scales, steps = random(3, 20), weight_codes(4, 20), torch.ones(4), torch.ones(20)
    x[1, 3] = bad
    found = multiply_codes(round_rows(x), weight, scales, sums_of(weight), Epilogue(), torch.float32)
    assert torch.isnan(found[1]).all()
    assert torch.isfinite(found[[0, 2]]).all()
    codes = round_rows(x, steps=steps, zero_point=128)
    static = multiply_codes(codes, weight, scales, sums_of(weight), Epilogue(), torch.float32)
    wanted = linear_int8_static(x, weight, scales, None, steps, 128)
    torch.testing.assert_close(static, wanted, rtol=1e-5, atol=1e-4, equal_nan=True)


def test_fp8_codes_are_the_nearest_numbers() -> None:
    x = torch.cat((random(400) * 60, random(400) / 500, torch.tensor([448.0, 0.0, 2.0**-10, 2.0**-6])))[None, :]
    x = x.clamp(-448, 448)
    codes, scales = round_fp8(x)
    assert torch.equal(scales, torch.ones(1))
    assert torch.equal(codes.float(), x.to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("groups", [1, 2])
def test_fp8(groups: int) -> None:
    x, bias = random(5, 64), random(20)
    weight = random(20, 64, seed=1).to(torch.float8_e4m3fn)
    scales = random(20, groups).abs() if groups > 1 else random(20).abs()
    codes, own = round_fp8(x, group_size=32 if groups > 1 else 0)
    wide = codes.double().unflatten(1, (groups, -1)) * own.double().view(5, groups, 1)
    numbers = weight.double().unflatten(1, (groups, -1)) * scales.double().view(20, groups, 1)
    wanted = functional.linear(wide.flatten(1), numbers.flatten(1), bias.double())
    check(linear_fp8(x, weight, scales, Epilogue(bias=bias)), wanted)
    x[2, 5] = math.inf
    found = linear_fp8(x, weight, scales)
    assert torch.isnan(found[2]).all()
    assert torch.isfinite(found[[0, 1, 3, 4]]).all()


def test_fp8_needs_a_newer_gpu_than_ampere() -> None:
    with recorded(dry=True, arch=80), pytest.raises(BackendError, match=r"compute capability 8.9, this GPU has 8.0"):
        linear_fp8(random(1, 16), torch.zeros(16, 16).to(torch.float8_e4m3fn), torch.ones(16))


@pytest.mark.parametrize("size", [16, 32])
def test_blocks(size: int) -> None:
    for dtype, rows in zip(DTYPES, (3, 40, 0)):
        weight, x, bias = random(2 * size, 3 * size), random(rows, 3 * size, dtype=dtype), random(2 * size)
        weight[:size, size:] = 0  # one row of blocks has one, the other
        weight[size:] = 0  # has none
        weight, bias = weight.to(dtype), bias.to(dtype)
        packed = BlockWeight.of(weight, size)
        assert packed.values.shape == (1, size, size)
        found = fused_linear_blocks(x, packed, Epilogue(bias=bias, activation="relu"))
        check(found, functional.linear(x.double(), weight.double(), bias.double()).relu(), dtype)


def test_what_cannot_be_stored_is_refused() -> None:
    with pytest.raises(BackendError, match="in blocks of 8 has no kernel"):
        BlockWeight.of(random(32, 32), 8)
    with pytest.raises(BackendError, match="in blocks of 32 has no kernel"):
        BlockWeight.of(random(48, 32), 32)
    with pytest.raises(BackendError, match="not on cpu"):
        two_of_four(random(64, 64).half())
