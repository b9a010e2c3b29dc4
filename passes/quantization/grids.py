"""Fitting the integer grid of a group of weights: scale, zero point, and where to clip."""

from __future__ import annotations

from collections.abc import Sequence

import torch

# Ranges tried by the search, as fractions of the full one (above 1: less is clipped on the short side). Against a
# search over 150 ratios the squared error is 1 to 2 % larger, on normal as on heavy-tailed weights. The wider the
# group, the further out its extremes lie, and the fewer the codes, the more it pays to clip them: within 0.3 % at two
# and three bits. At eight bits there is little to gain.
_NARROW = (1.07, 1.0, 0.92, 0.84, 0.75, 0.64)
_WIDE = (1.0, 0.87, 0.75, 0.63, 0.5, 0.38, 0.28)
_TWO_BITS_NARROW = (1.0, 0.88, 0.78, 0.69, 0.61, 0.54)
_TWO_BITS_WIDE = (1.0, 0.74, 0.65, 0.57, 0.5, 0.43, 0.36)
_EIGHT_BITS = (1.0, 0.94, 0.86)
_WIDE_GROUP = 512

TINY = torch.finfo(torch.float32).tiny

# Least and greatest code less the zero point, broadcastable to the weights; plain numbers, which clamp faster, where
# all groups share them.
_Bounds = tuple[torch.Tensor, torch.Tensor] | tuple[float, float]


def clip_ratios(bits: int, group_size: int) -> tuple[float, ...]:
    """The fractions of the full range that the clip search tries."""
    if bits > 4:
        return _EIGHT_BITS
    if bits == 2:
        return _TWO_BITS_NARROW if group_size < _WIDE_GROUP else _TWO_BITS_WIDE
    return _NARROW if group_size < _WIDE_GROUP else _WIDE


def fit_grid(
    weights: torch.Tensor,
    *,
    bits: int,
    symmetric: bool,
    clip_search: bool,
    importance: torch.Tensor | None = None,
    full_range: bool = True,
    even_range: bool = False,
    whole_zeros: bool = True,
    ratios: Sequence[float] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point of groups of weights, ``w ≈ (code - zero point) · scale``.

    Every clip ratio proposes a scale; rounding on it gives integers ``d``, and the scale that fits those integers best
    is the least-squares one, ``Σ w d / Σ d²``, whose squared error is ``Σ w² - (Σ w d)² / Σ d²``. The ratio with the
    least error wins. Without the search the full range is taken as it is.

    Symmetric grids put the group's largest magnitude on the end with one more code (``-2**(bits-1)``); the scale is
    negative where that magnitude is positive. Asymmetric grids always hold 0. A group of zeros, or of values whose
    scale would not be a normal float32, gets the scale 1, on which it rounds to zeros.

    Args:
        weights: ``[..., group]`` float32. A group with NaN or infinity gets a scale that is not finite.
        bits: bits per code.
        symmetric: zero point fixed at the middle code.
        clip_search: try other ranges than the full one.
        importance: ``[group]`` or broadcastable; weight of each column's squared error. Equal for ``None``.
        full_range: for symmetric grids, use the lowest code; without it codes are ``±(2**(bits-1) - 1)``.
        even_range: for symmetric grids without the search, a range that reaches half a step beyond the codes on the one
            side and as far short of them on the other: ``2**bits - 1`` steps from the negative largest magnitude to it.
        whole_zeros: for asymmetric grids, zero points are codes; else they may lie between codes.
        ratios: fractions of the range to try instead of :func:`clip_ratios`.

    Returns:
        scales ``[...]``, never 0, and zero points ``[...]`` as floats.
    """
    half = float(2 ** (bits - 1))
    high, low = weights.amax(-1), weights.amin(-1)
    lowest = 0.0
    if symmetric:
        zero = torch.full_like(high, half)
        scale = torch.where(high >= -low, high, low) / -half if full_range else torch.maximum(high, -low) / (half - 1)
        if even_range and not clip_search:
            # The largest weights lie in the middle between two codes. A scale that is less by a step of half precision
            # lets them fall to the outer one, if there is one, as ties do elsewhere, however it is stored.
            scale = torch.maximum(high, -low) / (half - 0.5) * (1 - 2.0**-10)
        lowest = 0.0 if full_range else 1.0
    else:
        high, low = high.clamp_min(0), low.clamp_max(0)
        scale = high / (2 * half - 1) - low / (2 * half - 1)
        zero = -low / torch.where(scale < TINY, torch.ones_like(scale), scale)
        zero = zero.round_() if whole_zeros else zero
    scale = torch.where(scale.abs() < TINY, torch.ones_like(scale), scale)
    if not clip_search:
        return scale, zero
    if ratios is None:
        ratios = clip_ratios(bits, weights.shape[-1])
    # In units of the full range's step the sums below neither overflow nor vanish, whatever the size of the weights.
    units = weights * (1.0 / scale).unsqueeze(-1)
    shift = None if symmetric or whole_zeros else zero.unsqueeze(-1)
    best = _least_squares_scale(units, _bounds(zero, lowest, 2 * half - 1, symmetric), importance, ratios, shift)
    return scale * best, zero


def _least_squares_scale(
    units: torch.Tensor,
    bounds: _Bounds,
    importance: torch.Tensor | None,
    ratios: Sequence[float],
    shift: torch.Tensor | None,
) -> torch.Tensor:
    """The scale with the least squared error among those that the ratios lead to; 1 for groups of zeros.

    Units are rounded to integers, or with a shift to numbers that are integers when it is added.
    """
    weighted = units if importance is None else units * importance
    best_gain, best = torch.zeros_like(units[..., 0]), torch.ones_like(units[..., 0])
    # In place throughout: the slice and these two buffers stay in the cache.
    steps, products = torch.empty_like(units), torch.empty_like(units)
    for ratio in ratios:
        torch.mul(units, 1.0 / ratio, out=steps)
        if shift is None:
            steps.round_()
        else:
            steps.add_(shift).round_().sub_(shift)
        steps.clamp_(*bounds)
        product = torch.mul(weighted, steps, out=products).sum(-1)
        torch.mul(steps, steps, out=products)
        square = (products if importance is None else products.mul_(importance)).sum(-1)
        fitted = product / square.clamp_min(TINY)
        gain = product * fitted
        better = gain > best_gain
        best_gain, best = torch.where(better, gain, best_gain), torch.where(better, fitted, best)
    return best


def _bounds(zero: torch.Tensor, lowest: float, highest: float, symmetric: bool) -> _Bounds:
    if symmetric:
        middle = (highest + 1) / 2
        return lowest - middle, highest - middle
    return (lowest - zero).unsqueeze(-1), (highest - zero).unsqueeze(-1)


def round_to_grid(
    weights: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int, lowest: float = 0.0
) -> torch.Tensor:
    """Codes of weights ``[..., group]`` on a grid, as floats: nearest, ties to even, clipped to the codes there are."""
    steps = torch.round(weights / scale.unsqueeze(-1))
    return steps.add_(zero.unsqueeze(-1)).clamp_(lowest, float(2**bits - 1))
