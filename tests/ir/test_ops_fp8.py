"""FP8 weights with FP8 activations: the operator's numbers, gradients and shape rule."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

from graphwright.ir import ops
from graphwright.ir.ops.rounded_activations import round_fp8


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def weight(rows: int, columns: int, group: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Bytes, scales, and the numbers that they stand for."""
    groups = -(-columns // group)
    numbers = random(rows, groups * group, seed=1)
    numbers[:, columns:] = 0
    stored = numbers.to(torch.float8_e4m3fn).unflatten(1, (groups, group))
    scales = random(rows, groups, seed=2).abs().half()
    wide = stored.double() * scales.double().unsqueeze(-1)
    return stored.view(torch.uint8), scales, wide.flatten(1)[:, :columns]


def run(*operands: Any) -> torch.Tensor:
    result: torch.Tensor = ops.get("linear_fp8_dynamic").target(*operands)
    return result


def test_activations_are_the_nearest_numbers() -> None:
    x = torch.tensor([[448.0, 1.0, 0.3, -7.7, 2.0**-9, 0.0], [0.0] * 6])
    values, scales = round_fp8(x)
    assert torch.equal(scales, torch.ones(2, 1))
    assert torch.equal(values[0], torch.tensor([448.0, 1.0, 0.3125, -7.5, 2.0**-9, 0.0]))
    grown, scale = round_fp8(x[:1] * 3)
    assert torch.equal(grown, values[:1])
    assert float(scale) == 3.0


@pytest.mark.parametrize("activation", ["per_token", "per_group"])
@pytest.mark.parametrize(("columns", "group"), [(32, 32), (70, 32), (5, 6)])
def test_values(columns: int, group: int, activation: str) -> None:
    x, bias = random(2, 3, columns), random(4)
    codes, scales, numbers = weight(4, columns, group)
    rounded = []
    size = columns if activation == "per_token" else group
    for part in x.double().split(size, -1):
        scale = part.abs().amax(-1, keepdim=True) / 448
        rounded.append((part / scale).to(torch.float8_e4m3fn).double() * scale)
    wanted = torch.cat(rounded, -1) @ numbers.t() + bias.double()
    found = run(x.double(), codes, scales, bias.double(), group, activation)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert run(x[:0], codes, scales, bias, group, activation).shape == (0, 3, 4)
    exact = x.double() @ numbers.t() + bias.double()
    assert float((found - exact).norm() / exact.norm()) < 0.05


@pytest.mark.parametrize("activation", ["per_token", "per_group"])
def test_gradients_go_straight_through(activation: str) -> None:
    codes, scales, numbers = weight(4, 70, 32)
    x, bias, slope = random(3, 70).requires_grad_(), random(4).requires_grad_(), random(3, 4)
    of_x, of_bias = torch.autograd.grad(run(x, codes, scales, bias, 32, activation), (x, bias), slope)
    torch.testing.assert_close(of_x.double(), slope.double() @ numbers, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(of_bias, slope.sum(0))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("activation", ["per_token", "per_group"])
def test_a_row_that_is_not_finite_has_no_numbers(bad: float, activation: str) -> None:
    codes, scales, _ = weight(4, 70, 32)
    x = random(3, 70)
    x[1, 40] = bad
    for given in (x, x.clone().requires_grad_()):
        found = run(given, codes, scales, None, 32, activation).detach()
        assert found[1].isnan().all()
        assert found[[0, 2]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_registration_and_shape_rule(dtype: torch.dtype) -> None:
    codes, scales, _ = weight(4, 20, 16)
    operands = random(2, 3, 20).to(dtype), codes, scales, random(4).to(dtype), 16, "per_group"
    target = ops.get("linear_fp8_dynamic").target
    torch.library.opcheck(target, operands, test_utils=("test_schema", "test_faketensor"))
    with FakeTensorMode() as mode:
        fake = target(*(mode.from_tensor(each) if isinstance(each, torch.Tensor) else each for each in operands))
    assert (fake.shape, fake.dtype) == ((2, 3, 4), dtype)
    assert ops.get("linear_fp8_dynamic").macs({"x": (2, 3, 20), "qweight": (4, 2, 16)}) == 2 * 3 * 20 * 4
    check: Any = ops.get("linear_fp8_dynamic").fake
    with pytest.raises(ValueError, match="activation 'static' is not one of per_token, per_group"):
        check(*operands[:5], "static")
