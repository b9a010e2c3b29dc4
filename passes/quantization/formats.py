"""How quantised weights are stored: the numbers a code can stand for, and which weights share a scale."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from graphwright.passes.quantization.grids import fit_grid, round_to_grid

_HALF = torch.finfo(torch.float16)


@dataclass(frozen=True)
class Format:
    """A grid of numbers for every group of weights.

    Every rounding method goes through :meth:`fit`, :meth:`round` and :meth:`values`, so it serves all formats.

    Attributes:
        bits: of a code.
        group_size: columns to a scale; ``None`` for one scale per row (output channel).
        symmetric: zero point fixed at the middle code, and not stored.
        clip_search: look for the range with the least squared error.
        integer_products: for products with quantised activations: codes are ``±(2**(bits - 1) - 1)``, without the
            lowest, and scales are stored in float32. Elsewhere scales are stored in half precision where all are
            normal numbers there.
    """

    bits: int
    group_size: int | None
    symmetric: bool
    clip_search: bool
    integer_products: bool = False

    def columns_per_group(self, columns: int) -> int:
        """The group size for a weight of so many columns; even, so that 4-bit codes pair up."""
        size = columns if self.group_size is None else self.group_size
        return size + size % 2

    def fit(
        self, weights: torch.Tensor, importance: torch.Tensor | None = None, *, clip_search: bool | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero point of groups of weights.

        Args:
            weights: ``[..., group]`` float32.
            importance: ``[group]`` or broadcastable; weight of each column's squared error.
            clip_search: instead of the format's own.

        Returns:
            scales ``[...]``, never 0, as they will be stored, and zero points ``[...]`` as floats.
        """
        scale, zero = fit_grid(
            weights.contiguous(),
            bits=self.bits,
            symmetric=self.symmetric,
            clip_search=self.clip_search if clip_search is None else clip_search,
            importance=importance,
            full_range=not self.integer_products,
        )
        return self.stored(scale).to(torch.float32), zero

    def stored(self, scales: torch.Tensor) -> torch.Tensor:
        """Scales in the dtype that they are stored in."""
        if self.integer_products:
            return scales
        size = scales.abs()
        fits = bool(((size >= _HALF.tiny) & (size <= _HALF.max)).all())
        return scales.to(torch.float16) if fits else scales

    def round(self, weights: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        """Codes nearest to weights ``[..., group]``, as floats; ``scale`` and ``zero`` are ``[...]``."""
        lowest = 1.0 if self.integer_products else 0.0
        return round_to_grid(weights, scale, zero, self.bits, lowest=lowest)

    def values(self, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        """What codes ``[..., group]`` stand for, float32; ``scale`` and ``zero`` are ``[...]``."""
        return (codes - zero.unsqueeze(-1)).mul_(scale.unsqueeze(-1))
