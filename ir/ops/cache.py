"""Decoding with a cache of keys and values: writing into it, attention over it, and the rows whose logits are wanted.

Sequences live in *slots* of the cache, each in its own: a step brings some tokens for some slots and says how many
tokens each of these already holds (``starts``). So prompts of different lengths need no padding, sequences may come
and go, and tokens are taken back by giving a smaller start. The operators are functional; a backend may write in place
where nothing else reads the cache that a step was given.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from graphwright.ir.ops.definition import OpDefinition


def cache_append(cache: torch.Tensor, new: torch.Tensor, slots: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """The cache with ``new`` written at positions ``starts[b] … starts[b] + S - 1`` of slot ``slots[b]``.

    Args:
        cache: ``[N, H, C, D]``: slots, key heads, capacity, head dim.
        new: keys or values of the step, ``[B, H, S, D]``.
        slots: int64 ``[B]``, distinct, below ``N``.
        starts: int64 ``[B]``, at most ``C - S``.

    Returns:
        ``[N, H, C, D]`` of cache's dtype.

    Raises:
        IndexError: a slot or position is outside the cache.
    """
    positions = starts.unsqueeze(1) + torch.arange(new.shape[2], device=new.device)
    result = cache.clone()
    result[slots.unsqueeze(1), :, positions] = new.transpose(1, 2).to(cache.dtype)
    return result


def cached_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    starts: torch.Tensor,
    slopes: torch.Tensor | None,
    scale: float,
    window: int,
    softcap: float,
) -> torch.Tensor:
    """Causal attention of new tokens over the cache that already holds their own keys and values.

    Token ``s`` of row ``b`` stands at position ``p = starts[b] + s`` and sees positions ``j <= p`` of slot
    ``slots[b]``; with a window only ``j > p - window``. Scores are ``scale · q kᵀ``, with ``softcap · tanh(score /
    softcap)`` for a softcap above 0 (Gemma 2), plus ``slopes[h] · (j - p)`` (ALiBi, Press et al. 2022).

    Args:
        query: ``[B, Hq, S, D]``.
        keys: ``[N, Hkv, C, D]``, see :func:`cache_append`; query head ``h`` reads key head ``h // (Hq / Hkv)``.
        values: ``[N, Hkv, C, Dv]``.
        slots: int64 ``[B]``.
        starts: int64 ``[B]``.
        slopes: ``[Hq]`` or ``None``.
        scale: factor on the products.
        window: 0 for none.
        softcap: 0 for none.

    Returns:
        ``[B, Hq, S, Dv]`` of query's dtype.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    groups = query.shape[1] // keys.shape[1]
    own_keys = keys[slots].to(wide).repeat_interleave(groups, dim=1)
    own_values = values[slots].to(wide).repeat_interleave(groups, dim=1)
    scores = torch.matmul(query.to(wide), own_keys.transpose(-1, -2)) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    position = starts.unsqueeze(1) + torch.arange(query.shape[2], device=query.device)
    distance = torch.arange(keys.shape[2], device=query.device) - position.unsqueeze(2)
    if slopes is not None:
        scores = scores + slopes.to(wide).view(1, -1, 1, 1) * distance.unsqueeze(1)
    seen = distance <= 0
    if window > 0:
        seen = seen & (distance > -window)
    weights = torch.softmax(scores.masked_fill(~seen.unsqueeze(1), float("-inf")), dim=-1)
    # What no token has been written to may hold anything, NaN included.
    written = (distance <= 0).any(dim=1)
    own_values = own_values.masked_fill(~written[:, None, :, None], 0.0)
    return torch.matmul(weights, own_values).to(query.dtype)


def select_rows(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """``y[b, k] = x[b, rows[b, k]]``: the tokens of a step whose logits are wanted.

    Args:
        x: ``[B, S, F]``.
        rows: int64 ``[B, K]``, below ``S``.

    Returns:
        ``[B, K, F]``.
    """
    return x.gather(1, rows.unsqueeze(2).expand(-1, -1, x.shape[2]))


def _append_fake(cache: torch.Tensor, new: torch.Tensor, slots: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    if cache.dim() != 4 or new.dim() != 4:
        raise ValueError("cache must be [slots, heads, capacity, head dim] and new [batch, heads, length, head dim]")
    torch._check(cache.shape[1] == new.shape[1], lambda: "cache and new need the same number of heads")
    torch._check(cache.shape[3] == new.shape[3], lambda: "cache and new need the same head dim")
    return torch.empty_like(cache)


def _attention_fake(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    starts: torch.Tensor,
    slopes: torch.Tensor | None,
    scale: float,
    window: int,
    softcap: float,
) -> torch.Tensor:
    if query.dim() != 4 or keys.dim() != 4 or values.dim() != 4:
        raise ValueError("query must be [batch, heads, length, dim], keys and values [slots, heads, capacity, dim]")
    torch._check(query.shape[1] % keys.shape[1] == 0, lambda: "query heads must be a multiple of key heads")
    torch._check(query.shape[3] == keys.shape[3], lambda: "query and keys need the same head dim")
    return query.new_empty((*query.shape[:3], values.shape[3]))


def _select_fake(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return x.new_empty((*rows.shape, x.shape[2]))


def _no_macs(arguments: Mapping[str, Any]) -> int:
    return 0


def _attention_macs(arguments: Mapping[str, Any]) -> int:
    # Of a full cache: how much of it is filled is not in the shapes.
    batch, heads, queries, width = arguments["query"]
    capacity, value_width = arguments["values"][2], arguments["values"][3]
    return int(batch * heads * queries * capacity * (width + value_width))


CACHE_APPEND = OpDefinition(
    name="cache_append",
    schema="(Tensor cache, Tensor new, Tensor slots, Tensor starts) -> Tensor",
    reference=cache_append,
    fake=_append_fake,
    macs=_no_macs,
    differentiable=("cache", "new"),
)
CACHED_ATTENTION = OpDefinition(
    name="cached_attention",
    schema=(
        "(Tensor query, Tensor keys, Tensor values, Tensor slots, Tensor starts, Tensor? slopes, float scale,"
        " int window, float softcap) -> Tensor"
    ),
    reference=cached_attention,
    fake=_attention_fake,
    macs=_attention_macs,
    differentiable=("query", "keys", "values", "slopes"),
)
SELECT_ROWS = OpDefinition(
    name="select_rows",
    schema="(Tensor x, Tensor rows) -> Tensor",
    reference=select_rows,
    fake=_select_fake,
    macs=_no_macs,
    differentiable=("x",),
)
