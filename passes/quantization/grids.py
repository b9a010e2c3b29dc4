"""Fitting the integer grid of a group of weights: scale, zero point, and where to clip."""

from __future__ import annotations

from collections.abc import Sequence

import torch

# Ranges tried, as fractions of the full one. Four-bit groups gain from clipping outliers; at eight bits little is left
# to gain.
CLIP_RATIOS: dict[int, tuple[float, ...]] = {
    4: (1.0, 0.92, 0.84, 0.75, 0.64),
    8: (1.0, 0.94, 0.86),
}


def fit_grid(
    weights: torch.Tensor,
    *,
    bits: int,
    symmetric: bool,
    clip_search: bool,
    importance: torch.Tensor | None = None,
    full_range: bool = True,
    ratios: Sequence[float] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point of groups of weights, ``w ≈ (code - zero point) · scale``.

    Every clip ratio proposes a scale; rounding on it gives integers ``d``, and the scale that fits those integers best
    is
    the least-squares one, ``Σ w d / Σ d²``, whose squared error is ``Σ w² - (Σ w d)² / Σ d²``. The ratio with the least
    error wins.
    Without the search the full range is taken as it is.

    Symmetric grids put the group's largest magnitude on the end with one more code (``-2**(bits-1)``); the scale is
    negative
    where that magnitude is positive. Asymmetric grids always hold 0.

    Args:
        weights: ``[..., group]`` float32, finite.
        bits: bits per code.
        symmetric: zero point fixed at the middle code.
        clip_search: try narrower ranges.
        importance: ``[group]`` or broadcastable; weight of each column's squared error. Equal for ``None``.
        full_range: for symmetric grids, use the lowest code; without it codes are ``±(2**(bits-1) - 1)``.
        ratios: fractions of the range to try instead of :data:`CLIP_RATIOS`.

    Returns:
        scales ``[...]``, never 0, and zero points ``[...]`` as floats.
    """
    half = float(2 ** (bits - 1))
    high, low = weights.amax(-1), weights.amin(-1)
    if symmetric:
        zero = torch.full_like(high, half)
        scale = torch.where(high >= -low, high, low) / -half if full_range else torch.maximum(high, -low) / (half - 1)
        lowest = 0.0 if full_range else 1.0
    else:
        high, low = high.clamp_min(0), low.clamp_max(0)
        scale = (high - low) / (2 * half - 1)
        zero = torch.round(-low / torch.where(scale == 0, torch.ones_like(scale), scale))
        lowest = 0.0
    # A group of zeros (or of values that vanish in float32) stands for zeros on any scale.
    scale = torch.where(scale.abs() < torch.finfo(torch.float32).tiny, torch.ones_like(scale), scale)
    if not clip_search:
        return scale, zero
    lower, upper = _bounds(zero, lowest, 2 * half - 1, symmetric)
    weighted = weights if importance is None else weights * importance
    best_gain, best = torch.full_like(scale, -1.0), scale
    steps, products = torch.empty_like(weights), torch.empty_like(weights)
    for ratio in ratios if ratios is not None else CLIP_RATIOS[8 if bits > 4 else 4]:
        # In place throughout: the slice and these two buffers stay in the cache.
        torch.mul(weights, (1.0 / (scale * ratio)).unsqueeze(-1), out=steps).round_()
        torch.clamp(steps, lower, upper, out=steps)
        product = torch.mul(weighted, steps, out=products).sum(-1)
        torch.mul(steps, steps, out=products)
        square = (products if importance is None else products.mul_(importance)).sum(-1)
        fitted = product / square.clamp_min(torch.finfo(torch.float32).tiny)
        gain = product * fitted
        better = (gain > best_gain) & (fitted.abs() >= torch.finfo(torch.float32).tiny)
        best_gain, best = torch.where(better, gain, best_gain), torch.where(better, fitted, best)
    return best, zero


def _bounds(
    zero: torch.Tensor, lowest: float, highest: float, symmetric: bool
) -> tuple[torch.Tensor | float, torch.Tensor | float]:
    """Least and greatest ``code - zero point``; plain numbers where all groups share them, which clamps faster."""
    if symmetric:
        middle = (highest + 1) / 2
        return lowest - middle, highest - middle
    return (lowest - zero).unsqueeze(-1), (highest - zero).unsqueeze(-1)


def round_to_grid(
    weights: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int, lowest: float = 0.0
) -> torch.Tensor:
    """Codes of weights ``[..., group]`` on a grid, uint8: nearest, ties to even, clipped to the codes there are."""
    steps = torch.round(weights / scale.unsqueeze(-1))
    return steps.add_(zero.unsqueeze(-1)).clamp_(lowest, float(2**bits - 1)).to(torch.uint8)
