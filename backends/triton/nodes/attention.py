"""Attention of a program, and the caches of decoding steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from graphwright.backends.triton.kernels.attention import WIDEST_HEAD, attention
from graphwright.backends.triton.kernels.cached_attention import append, cached_attention
from graphwright.backends.triton.nodes.base import NodeKernel, Site, wants_gradient
from graphwright.ir import ops


class Attention(NodeKernel):
    """``attention`` without a bias."""

    inputs = ("query", "key", "value", "key_mask", "scale", "causal", "window")
    label = "attention (the reference where gradients are wanted)"

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_mask: torch.Tensor | None,
        scale: float,
        causal: bool,
        window: int,
    ) -> torch.Tensor:
        """Without gradients; the reference where they are wanted."""
        if wants_gradient(query, key, value):
            target = ops.get("attention").target
            result: torch.Tensor = target(query, key, value, key_mask, None, scale, causal, window)
            return result
        return attention(query, key, value, key_mask, scale, causal, window)


@dataclass(frozen=True)
class Cache:
    """Keys or values of all slots, written in place.

    Attributes:
        values: ``[N, H, C, D]``.
        scales: float32 ``[N, H, C]`` where values are int8, else ``None``.
    """

    values: torch.Tensor
    scales: torch.Tensor | None = None


class Append(NodeKernel):
    """``cache_append`` in place: for sessions, whose caches nobody else reads."""

    inputs = ("cache", "new", "slots", "starts")
    label = "cache_append, in place in sessions"

    def forward(
        self, cache: Cache | torch.Tensor, new: torch.Tensor, slots: torch.Tensor, starts: torch.Tensor
    ) -> object:
        """The cache itself, or a new one where it is a plain tensor."""
        if isinstance(cache, Cache):
            append(cache.values, cache.scales, new, slots, starts)
            return cache
        if wants_gradient(cache, new):
            return ops.get("cache_append").target(cache, new, slots, starts)
        copy = cache.clone(memory_format=torch.contiguous_format)
        append(copy, None, new, slots, starts)
        return copy


class CachedAttention(NodeKernel):
    """``cached_attention``."""

    inputs = ("query", "keys", "values", "slots", "starts", "slopes", "scale", "window", "softcap")
    label = "cached_attention (split-K; the reference where gradients are wanted)"

    def forward(
        self,
        query: torch.Tensor,
        keys: Cache | torch.Tensor,
        values: Cache | torch.Tensor,
        slots: torch.Tensor,
        starts: torch.Tensor,
        slopes: torch.Tensor | None,
        scale: float,
        window: int,
        softcap: float,
    ) -> torch.Tensor:
        """Without gradients; the reference where they are wanted."""
        if isinstance(keys, Cache) and isinstance(values, Cache):
            return cached_attention(
                query,
                keys.values,
                values.values,
                slots,
                starts,
                slopes,
                scale,
                window,
                softcap,
                key_scales=keys.scales,
                value_scales=values.scales,
            )
        assert isinstance(keys, torch.Tensor)
        assert isinstance(values, torch.Tensor)
        if wants_gradient(query, keys, values):
            reference = ops.get("cached_attention").target
            result: torch.Tensor = reference(query, keys, values, slots, starts, slopes, scale, window, softcap)
            return result
        keys, values = keys.contiguous(), values.contiguous()
        return cached_attention(query, keys, values, slots, starts, slopes, scale, window, softcap)


def _head_reason(site: Site, *names: str) -> str | None:
    for name in names:
        width = site.value(name).shape[-1]
        if not isinstance(width, int) or width > WIDEST_HEAD:
            return f"heads are wider than {WIDEST_HEAD}, or of a width that is not known"
    return None


def lower_attention(site: Site) -> NodeKernel | str:
    """``graphwright.attention``."""
    if site.arguments["bias"] is not None:
        return "the kernel takes no bias on the scores"
    return site.unlike("query", "key", "value") or _head_reason(site, "query", "value") or Attention()


def lower_append(site: Site) -> NodeKernel | str:
    """``graphwright.cache_append``."""
    return site.unlike("new") or site.unlike("cache") or _head_reason(site, "new") or Append()


def lower_cached_attention(site: Site) -> NodeKernel | str:
    """``graphwright.cached_attention``."""
    reason = site.unlike("query") or site.unlike("keys", "values") or _head_reason(site, "query", "values")
    return reason or CachedAttention()
