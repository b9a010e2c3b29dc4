"""Rotary position embedding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from graphwright.ir.ops.definition import OpDefinition


def rotary_embedding(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Rotate pairs of features by position-dependent angles (Su et al. 2021, RoFormer, eq. 34).

    ``y = x * cos + rotate(x) * sin``, where ``rotate`` maps the pair ``(a, b)`` to ``(-b, a)``. The pairs are the two
    halves of the head dim, or neighbours when ``interleaved``. A ``cos`` narrower than the head dim rotates only its
    leading features (partial rotary).

    Args:
        x: ``[B, H, S, D]``.
        cos: ``[B or 1, S, R]`` with ``R <= D``, already repeated to both members of a pair.
        sin: like cos.
        interleaved: how pairs lie in the head dim.

    Returns:
        ``[B, H, S, D]`` of x's dtype.
    """
    width = cos.shape[-1]
    rotated_part, rest = x[..., :width], x[..., width:]
    if interleaved:
        even, odd = rotated_part[..., 0::2], rotated_part[..., 1::2]
        turned = torch.stack((-odd, even), dim=-1).flatten(-2)
    else:
        low, high = rotated_part.chunk(2, dim=-1)
        turned = torch.cat((-high, low), dim=-1)
    rotated = rotated_part * cos.unsqueeze(1) + turned * sin.unsqueeze(1)
    return torch.cat((rotated.to(x.dtype), rest), dim=-1)


def _macs(arguments: Mapping[str, Any]) -> int:
    return 0


ROTARY_EMBEDDING = OpDefinition(
    name="rotary_embedding",
    schema="(Tensor x, Tensor cos, Tensor sin, bool interleaved) -> Tensor",
    reference=rotary_embedding,
    macs=_macs,
    differentiable=("x", "cos", "sin"),
)
