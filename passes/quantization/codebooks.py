"""Fitting the scale of a group of weights to a fixed table of values, and rounding to it."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from graphwright.ir.ops.codebook import Codebook, codebook

_TINY = torch.finfo(torch.float32).tiny

# Ranges tried by the search, as fractions of the largest magnitude. The values of 8 bits are as dense, relative to
# their size, an octave further down: there it pays to look where in an octave the weights fall, and never to clip.
_NARROW = (1.1, 1.0, 0.92, 0.85, 0.77)
_WIDE = (1.0, 0.87, 0.75, 0.63, 0.5, 0.38)
_EIGHT_BITS = (1.0, 1.15, 1.32, 1.52, 1.74)
_WIDE_GROUP = 512


def codebook_ratios(book: Codebook, group_size: int) -> tuple[float, ...]:
    """The fractions of the full range that the clip search tries."""
    if book.bits == 8:
        return _EIGHT_BITS
    return _NARROW if group_size < _WIDE_GROUP else _WIDE


def fit_codebook(
    weights: torch.Tensor,
    name: str,
    *,
    clip_search: bool,
    importance: torch.Tensor | None = None,
    ratios: Sequence[float] | None = None,
) -> torch.Tensor:
    """Scales of groups of weights, ``w ≈ table[code] · scale``.

    Without the search the largest magnitude falls on the table's largest. With it every ratio proposes a scale;
    rounding on it gives values ``d`` of the table, and the scale that fits those best is the least-squares one,
    ``Σ w d / Σ d²``, with the squared error ``Σ w² - (Σ w d)² / Σ d²``. The ratio with the least error wins.

    Args:
        weights: ``[..., group]`` float32. A group with NaN or infinity gets a scale that is not finite.
        name: of the codebook.
        clip_search: try other ranges than the full one.
        importance: ``[group]`` or broadcastable; weight of each column's squared error. Equal for ``None``.
        ratios: fractions of the range to try instead of :func:`codebook_ratios`.

    Returns:
        scales ``[...]``, positive; 1 for groups of zeros, and of values whose scale would not be a normal float32.
    """
    book = codebook(name)
    scale = weights.abs().amax(-1) / book.largest
    scale = torch.where(scale < _TINY, torch.ones_like(scale), scale)
    if not clip_search:
        return scale
    units = weights * (1.0 / scale).unsqueeze(-1)
    weighted = units if importance is None else units * importance
    best_gain, best = torch.zeros_like(scale), torch.ones_like(scale)
    for ratio in codebook_ratios(book, weights.shape[-1]) if ratios is None else ratios:
        values = book.table[nearest_codes(units / ratio, book)]
        product = (weighted * values).sum(-1)
        square = (values * values if importance is None else values * values * importance).sum(-1)
        fitted = product / square.clamp_min(_TINY)
        gain = product * fitted
        better = gain > best_gain
        best_gain, best = torch.where(better, gain, best_gain), torch.where(better, fitted, best)
    # Through the product, so that what is not finite stays visible.
    return scale * best


def nearest_codes(units: torch.Tensor, book: Codebook) -> torch.Tensor:
    """Codes, int64, of the table's values nearest to ``units`` float32; clipped to the table's ends.

    Ties go to the even mantissa for 8 bits, to the lower value for 4. No code of NaN, infinity or -0 is given for a
    number; NaN gets some code.
    """
    if book.stored_as is not None:
        clipped = units.clamp(-book.largest, book.largest)
        codes = clipped.to(book.stored_as).view(torch.uint8)
        return torch.where(codes == 128, 0, codes.to(torch.int64))
    order, edges = _edges(book)
    return order[torch.bucketize(units, edges)]


@functools.cache
def _edges(book: Codebook) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes by ascending value, one for each value, and the middles between neighbours."""
    order = sorted({value: code for code, value in reversed(list(enumerate(book.values)))}.items())
    values = torch.tensor([value for value, _ in order], dtype=torch.float32)
    return torch.tensor([code for _, code in order]), (values[1:] + values[:-1]) / 2
