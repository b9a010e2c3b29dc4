"""Rounding with gradients, against the formulas of the papers."""

from __future__ import annotations

import math

import pytest
import torch

from graphwright.ir import ops
from graphwright.ir.ops.fake_quantize import codes_of

OP = ops.get("fake_quantize").target


def expected(x: torch.Tensor, s: float, z: float, low: int, high: int) -> list[torch.Tensor]:
    """Value, its derivative by x, and by the scale: Esser et al. 2020, equations 1 to 3 and 5, element by element."""
    value, by_x, by_scale = [], [], []
    for v in x.flatten().tolist():
        u = v / s
        if u <= low - z:
            steps, inside, slope = low - z, 0.0, low - z
        elif u >= high - z:
            steps, inside, slope = high - z, 0.0, high - z
        else:
            steps = round(u)
            inside, slope = 1.0, -u + round(u)
        value.append(steps * s)
        by_x.append(inside)
        by_scale.append(slope)
    return [torch.tensor(item, dtype=torch.float64).reshape(x.shape) for item in (value, by_x, by_scale)]


@pytest.mark.parametrize(("low", "high", "zero"), [(-8, 7, None), (0, 255, 131), (0, 15, 3), (-2, 1, None)])
def test_one_scale_for_all(low: int, high: int, zero: int | None) -> None:
    x = torch.randn(3, 4, 10, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(0.3 if high < 100 else 0.01, dtype=torch.float64, requires_grad=True)
    point = torch.tensor(zero, dtype=torch.uint8) if zero is not None else None
    weights = torch.randn(3, 4, 10, dtype=torch.float64)
    found = OP(x, scale, point, low, high, 0)
    (found * weights).sum().backward()
    value, by_x, by_scale = expected(x.detach(), float(scale.detach()), zero or 0, low, high)
    torch.testing.assert_close(found.detach(), value, rtol=0, atol=1e-12)
    torch.testing.assert_close(x.grad, weights * by_x)
    factor = 1 / math.sqrt(10 * (high - low) / 2)
    torch.testing.assert_close(scale.grad, (weights * by_scale).sum() * factor)


def test_a_scale_for_each_group() -> None:
    """Groups of 4 of 10 columns: the last is shorter."""
    x = torch.randn(3, 10, dtype=torch.float64, requires_grad=True)
    scale = (0.2 + torch.rand(3, 3, dtype=torch.float64)).requires_grad_()
    zero = torch.randint(0, 16, (3, 3), dtype=torch.uint8)
    weights = torch.randn(3, 10, dtype=torch.float64)
    found = OP(x, scale, zero, 0, 15, 4)
    (found * weights).sum().backward()
    for row in range(3):
        for group in range(3):
            span = slice(4 * group, min(4 * group + 4, 10))
            z, s = float(zero[row, group]), float(scale[row, group].detach())
            value, by_x, by_scale = expected(x[row, span].detach(), s, z, 0, 15)
            torch.testing.assert_close(found[row, span].detach(), value, rtol=0, atol=1e-12)
            torch.testing.assert_close(x.grad[row, span], weights[row, span] * by_x)
            wanted = (weights[row, span] * by_scale).sum() / math.sqrt(4 * 15 / 2)
            torch.testing.assert_close(scale.grad[row, group], wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_gets_the_codes_of_float64(dtype: torch.dtype) -> None:
    """Scales and weights of few digits make quotients that lie on and next to the middle between two codes."""
    x = (torch.arange(-4000, 4000) / 64).reshape(40, 200).to(dtype)
    scale = torch.linspace(0.3, 0.9, 80).reshape(40, 2).to(dtype)
    found = OP(x, scale, None, -128, 127, 100)
    codes = codes_of(x, scale, None, -128, 127, 100)
    exact = torch.round(x.double() / scale.double().repeat_interleave(100, 1)).clamp(-128, 127)
    assert torch.equal(codes.double(), exact)
    assert torch.equal(found, (exact * scale.double().repeat_interleave(100, 1)).to(dtype))
    assert codes.dtype == torch.int16


@pytest.mark.parametrize("columns", [0, 1, 2, 3, 7, 8, 9])
def test_tails_and_special_values(columns: int) -> None:
    x = torch.randn(2, columns)
    groups = -(-columns // 4)
    assert OP(x, torch.ones(2, groups), None, -8, 7, 4).shape == (2, columns)
    if columns > 2:
        x[0, 0], x[0, 1], x[0, 2] = float("inf"), -float("inf"), float("nan")
        found = OP(x, torch.ones(2, groups), None, -8, 7, 4)
        assert found[0, :2].tolist() == [7.0, -8.0]
        assert found.isnan().nonzero().tolist() == [[0, 2]]


@pytest.mark.parametrize(
    ("shape", "scale", "group", "message"),
    [((2, 8), (2, 3), 4, "scale must be"), ((2, 2, 8), (2, 2), 4, "for matrices"), ((2, 8), (1,), 0, "scale must be")],
)
def test_shapes_that_do_not_fit(shape: tuple[int, ...], scale: tuple[int, ...], group: int, message: str) -> None:
    fake = ops.get("fake_quantize").fake
    assert fake is not None
    with pytest.raises((RuntimeError, ValueError), match=message):
        fake(torch.empty(shape), torch.empty(scale), None, -8, 7, group)


def test_torch_finds_nothing_wrong_with_the_registration() -> None:
    x, scale = torch.randn(3, 10, requires_grad=True), torch.rand(3, 3) + 0.1
    torch.library.opcheck(OP, (x, scale.requires_grad_(), torch.zeros(3, 3, dtype=torch.uint8), 0, 15, 4))
