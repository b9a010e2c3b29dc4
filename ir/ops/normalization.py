"""Normalisation operators."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from graphwright.ir.ops.definition import OpDefinition


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """Root-mean-square normalisation over the last dimension (Zhang & Sennrich 2019, eq. 4).

    ``y = x / sqrt(mean(x²) + eps) * weight``, computed in float32 or wider.

    Args:
        x: ``[..., d]``.
        weight: ``[d]`` or ``None`` for no scale.
        eps: added to the mean square.

    Returns:
        ``[..., d]`` of x's dtype.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if weight is not None:
        normed = normed * weight.to(normed.dtype)
    return normed.to(x.dtype)


def _macs(arguments: Mapping[str, Any]) -> int:
    return 0


RMS_NORM = OpDefinition(
    name="rms_norm",
    schema="(Tensor x, Tensor? weight, float eps) -> Tensor",
    reference=rms_norm,
    macs=_macs,
    differentiable=("x", "weight"),
)
