"""Linears on packed weights against the reference in float64: both regimes, tails, epilogues, gradients."""

from __future__ import annotations

import math

import pytest
import torch
from tests.backends.triton.oracle import DTYPES, check, random, same_where_not_finite
from torch.nn import functional

from graphwright.backends.triton.kernels.epilogue import Epilogue
from graphwright.backends.triton.kernels.linear_nbits import fused_linear_nbits, input_gradient, linear_nbits
from graphwright.backends.triton.kernels.nbits_weight import NbitsWeight, refusal, repack
from graphwright.ir.errors import BackendError
from graphwright.ir.ops.quantization import dequantize, pack

# (out, in, bits, group, asymmetric): groups that do and do not fill bytes' halves, and inputs that end inside one.
WEIGHTS = [
    (5, 32, 4, 32, False),
    (70, 100, 4, 32, True),
    (33, 130, 4, 64, True),
    (3, 300, 4, 128, False),
    (17, 96, 4, 96, True),
    (20, 100, 8, 32, True),
    (9, 256, 8, 128, False),
    (6, 64, 3, 32, True),
    (6, 70, 2, 64, False),
]


def made(out: int, columns: int, bits: int, group: int, asymmetric: bool) -> tuple[NbitsWeight, torch.Tensor]:
    """The weight as kernels read it, and as numbers."""
    generator = torch.Generator().manual_seed(out + columns)
    groups = -(-columns // group)
    codes = torch.randint(0, 2**bits, (out, columns), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(0, 2**bits, (out, groups), generator=generator, dtype=torch.uint8) if asymmetric else None
    scales = (torch.rand(out, groups, generator=generator) + 0.1).half()
    qweight = pack(codes, bits, group, zeros)
    weight = dequantize(qweight, scales, zeros, bits, columns, torch.float64)
    return repack(qweight, scales, zeros, bits, group, columns), weight


@pytest.mark.parametrize("rows", [0, 1, 3, 16, 17])
@pytest.mark.parametrize("case", WEIGHTS, ids=str)
def test_values(case: tuple[int, int, int, int, bool], rows: int) -> None:
    weight, numbers = made(*case)
    torch.testing.assert_close(weight.dense(torch.float64), numbers, rtol=0, atol=0)
    dtype = DTYPES[rows % 3]
    x, bias = random(rows, case[1], dtype=dtype), random(case[0], dtype=dtype)
    check(linear_nbits(x, weight, bias), functional.linear(x.double(), numbers, bias.double()), dtype)


@pytest.mark.parametrize("splits", [1, 2, 3, 9])
def test_sums_of_programs_that_share_the_input(splits: int) -> None:
    weight, numbers = made(20, 1000, 4, 128, True)
    x, bias, gate = random(3, 1000, dtype=torch.float16), random(20).half(), random(3, 20, seed=1).half()
    found = fused_linear_nbits(x, weight, Epilogue(bias=bias, activation="relu", factor=gate), splits=splits)
    check(found, functional.linear(x.double(), numbers, bias.double()).relu() * gate.double())


@pytest.mark.parametrize("rows", [2, 20])
@pytest.mark.parametrize("activation", ["", "silu", "gelu", "gelu_tanh", "relu", "tanh"])
def test_epilogues(activation: str, rows: int) -> None:
    weight, numbers = made(40, 100, 4, 32, False)
    x, bias, factor, residual = random(rows, 100) / 20, random(40), random(rows, 40, seed=1), random(40, seed=2)
    down, up = random(rows, 5, seed=3), random(40, 5, seed=4)
    epilogue = Epilogue(bias, activation, factor, residual, down, up)
    wanted = functional.linear(x.double(), numbers, bias.double()) + down.double() @ up.double().t()
    named = {"gelu_tanh": lambda y: functional.gelu(y, approximate="tanh"), "": lambda y: y, "tanh": torch.tanh}
    wanted = named.get(activation, getattr(functional, activation, None))(wanted)  # type: ignore[misc]
    for splits in (1, 2):
        check(fused_linear_nbits(x, weight, epilogue, splits=splits), wanted * factor.double() + residual.double())


def test_inputs_of_any_stride() -> None:
    weight, numbers = made(7, 64, 4, 32, True)
    base = random(6, 3, 65)
    for x in (base[:, 1, 1:], base[::2, :, :64], base[:3, :, :64].transpose(0, 1)):
        check(linear_nbits(x, weight), functional.linear(x.double(), numbers))


@pytest.mark.parametrize("case", WEIGHTS, ids=str)
def test_gradient_of_the_input(case: tuple[int, int, int, int, bool]) -> None:
    weight, numbers = made(*case)
    for dtype, rows in zip(DTYPES, (0, 5, 33)):
        grad = random(rows, case[0], dtype=dtype)
        check(input_gradient(grad, weight), grad.double() @ numbers, dtype)


def test_gradients_through_autograd() -> None:
    weight, numbers = made(7, 64, 4, 32, True)
    x, bias, slope = random(2, 3, 64).requires_grad_(), random(7).requires_grad_(), random(2, 3, 7)
    of_x, of_bias = torch.autograd.grad(linear_nbits(x, weight, bias), (x, bias), slope)
    check(of_x, slope.double() @ numbers)
    check(of_bias, slope.double().sum((0, 1)))


@pytest.mark.parametrize("rows", [3, 20])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite(bad: float, rows: int) -> None:
    weight, numbers = made(9, 64, 4, 32, True)
    x = random(rows, 64)
    x[1, 40] = bad
    same_where_not_finite(linear_nbits(x, weight), functional.linear(x.double(), numbers))


def test_what_no_kernel_reads() -> None:
    assert "multiple of 32" in str(refusal(4, 48, None))
    assert "between codes" in str(refusal(4, 32, torch.zeros(2, 2)))
    assert refusal(4, 32, torch.zeros(2, 2, dtype=torch.uint8)) is None
    weight, _ = made(9, 64, 4, 32, True)
    with pytest.raises(BackendError, match="takes 64 features, not 63"):
        linear_nbits(random(2, 63), weight)
    with pytest.raises(BackendError, match="factor .* does not fit"):
        fused_linear_nbits(random(2, 64), weight, Epilogue(factor=random(3, 9)))
