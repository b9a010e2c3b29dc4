"""Scaled dot-product attention with the mask kept in the form kernels want it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from graphwright.ir.ops.definition import OpDefinition


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: float,
    causal: bool,
    window: int,
) -> torch.Tensor:
    """``softmax(scale · Q Kᵀ + mask + bias) V`` (Vaswani et al. 2017, eq. 1), grouped-query (Ainslie et al. 2023).

    Args:
        query: ``[B, Hq, S, D]``.
        key: ``[B, Hkv, T, D]``; ``Hq`` is a multiple of ``Hkv`` and query head ``h`` reads key head ``h // (Hq /
            Hkv)``.
        value: ``[B, Hkv, T, Dv]``.
        key_mask: bool ``[B or 1, T]``, True where a key may be attended, or ``None``.
        bias: added to the scores, broadcastable to ``[B, Hq, S, T]``; bool means True = may be attended. Or ``None``.
        scale: factor on the scores.
        causal: query ``i`` sees keys ``j <= i + T - S`` only.
        window: when above 0, also only keys ``j > i + T - S - window``.

    Returns:
        ``[B, Hq, S, Dv]`` of query's dtype. A query with nothing to attend gives zeros.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key = key.repeat_interleave(groups, dim=1)
        value = value.repeat_interleave(groups, dim=1)
    scores = torch.matmul(query.to(wide), key.to(wide).transpose(-1, -2)) * scale
    allowed = allowed_keys(scores, key_mask, causal, window)
    if bias is not None and bias.dtype == torch.bool:
        allowed = bias if allowed is None else allowed & bias
    elif bias is not None:
        scores = scores + bias.to(wide)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    # A row of -inf only has no softmax; such a query attends nothing and yields zero.
    empty = (scores == float("-inf")).all(dim=-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(empty, 0.0), dim=-1).masked_fill(empty, 0.0)
    return torch.matmul(weights, value.to(wide)).to(query.dtype)


def allowed_keys(scores: torch.Tensor, key_mask: torch.Tensor | None, causal: bool, window: int) -> torch.Tensor | None:
    """Which keys queries may attend, bool, broadcastable to the scores ``[B, Hq, S, T]``; ``None`` for all."""
    allowed: torch.Tensor | None = None
    if causal or window > 0:
        queries, keys = scores.shape[-2], scores.shape[-1]
        last = torch.arange(queries, device=scores.device).unsqueeze(1) + (keys - queries)
        position = torch.arange(keys, device=scores.device).unsqueeze(0)
        if causal:
            allowed = position <= last
        if window > 0:
            inside = position > last - window
            allowed = inside if allowed is None else allowed & inside
    if key_mask is not None:
        padding = key_mask.to(torch.bool)[:, None, None, :]
        allowed = padding if allowed is None else allowed & padding
    return allowed


def _fake(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: float,
    causal: bool,
    window: int,
) -> torch.Tensor:
    if query.dim() != 4 or key.dim() != 4 or value.dim() != 4:
        raise ValueError("query, key and value must be [batch, heads, length, head dim]")
    torch._check(query.shape[1] % key.shape[1] == 0, lambda: "query heads must be a multiple of key heads")
    torch._check(key.shape[1] == value.shape[1], lambda: "key and value need the same number of heads")
    torch._check(query.shape[3] == key.shape[3], lambda: "query and key need the same head dim")
    torch._check(key.shape[2] == value.shape[2], lambda: "key and value need the same length")
    return query.new_empty((*query.shape[:3], value.shape[3]))


def _macs(arguments: Mapping[str, Any]) -> int:
    batch, heads, queries, width = arguments["query"]
    keys, value_width = arguments["value"][2], arguments["value"][3]
    return int(batch * heads * queries * keys * (width + value_width))


ATTENTION = OpDefinition(
    name="attention",
    schema=(
        "(Tensor query, Tensor key, Tensor value, Tensor? key_mask, Tensor? bias, float scale, bool causal, int window)"
        " -> Tensor"
    ),
    reference=attention,
    fake=_fake,
    macs=_macs,
    differentiable=("query", "key", "value", "bias"),
)
