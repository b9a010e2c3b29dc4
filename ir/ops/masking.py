"""Weights with positions that stay 0 while they train."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from graphwright.ir.ops.definition import OpDefinition


def apply_mask(weight: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """``weight`` where the mask is set, 0 elsewhere, whatever stands there (NaN included).

    The gradient of the weight is that of the result where the mask is set and exactly 0 elsewhere, so that an
    optimiser's momentum and weight decay leave masked weights at the 0 that they start from.

    Args:
        weight: floating, of any shape.
        mask: bool, of the same shape.
    """
    return torch.where(mask, weight, 0)


def _fake(weight: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    torch._check(mask.dtype == torch.bool, lambda: f"the mask must be bool, not {mask.dtype}")
    torch._check(mask.shape == weight.shape, lambda: f"the mask is {list(mask.shape)}, the weight {list(weight.shape)}")
    return weight.new_empty(weight.shape)


def _macs(arguments: Mapping[str, Any]) -> int:
    return 0


APPLY_MASK = OpDefinition(
    name="apply_mask",
    schema="(Tensor weight, Tensor mask) -> Tensor",
    reference=apply_mask,
    fake=_fake,
    macs=_macs,
    differentiable=("weight",),
)
