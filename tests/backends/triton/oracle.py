"""What kernels are held to: the reference in float64, and the rounding of their dtype."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

HALF = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, *HALF)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def wide(value: Any) -> Any:
    """Floating tensors in float64."""
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def check(found: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype | None = None, *, roundings: float = 2) -> None:
    """Largest error relative to the largest value: so many roundings to the dtype, and those of float32 sums."""
    kind = found.dtype if dtype is None else dtype
    assert found.shape == wanted.shape
    if found.numel() == 0:
        return
    limit = roundings * torch.finfo(kind).eps + 2e-6
    error = float((found.double() - wanted.double()).abs().max() / wanted.double().abs().max().clamp(min=1e-9))
    assert error <= limit, f"{error:.2e} is above {limit:.2e}"


def gradients(
    function: Callable[..., torch.Tensor], operands: Sequence[torch.Tensor], slope: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Of ``sum(function(*operands) * slope)``."""
    leaves = [operand.detach().clone().requires_grad_() for operand in operands]
    return torch.autograd.grad(function(*leaves), leaves, slope)


def same_where_not_finite(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """NaN and infinity stand where the reference has them, the rest agrees."""
    torch.testing.assert_close(found.double(), wanted.double(), rtol=1e-2, atol=1e-2, equal_nan=True)
