"""How quantised weights are stored: the numbers a code can stand for, and which weights share a scale."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from graphwright.ir.ops.codebook import NAMES, codebook
from graphwright.ir.ops.quantization import codes_per_unit
from graphwright.passes.quantization.codebooks import fit_codebook, nearest_codes
from graphwright.passes.quantization.grids import fit_grid, round_to_grid

_HALF = torch.finfo(torch.float16)

# What a code may stand for: an integer step, or a value of a table.
DTYPES = ("int", *NAMES)


@dataclass(frozen=True)
class Format:
    """A grid of numbers for every group of weights.

    Every rounding method goes through :meth:`fit`, :meth:`round` and :meth:`values`, so it serves all formats. A code
    is a whole number below ``2**bits``; the "zero point" of a group is the code that stands for 0. With a codebook the
    distances between codes mean nothing: only :meth:`values` says what a code stands for.

    Attributes:
        bits: of a code.
        group_size: columns to a scale; ``None`` for one scale per row (output channel).
        symmetric: zero point fixed at the middle code, and not stored.
        clip_search: look for the range with the least squared error.
        integer_products: for products with quantised activations: codes are ``±(2**(bits - 1) - 1)``, without the
            lowest, and scales are stored in float32. Elsewhere scales are stored in half precision where all are
            normal numbers there.
        codebook: name of the table of values that codes stand for, see :func:`graphwright.ir.ops.codebook.codebook`;
            ``None`` for integers.
        block_rows: neighbouring rows that share a scale. Scales are still stored for every row, so that every
            operator and kernel reads them the same way: 2 bytes for ``group_size`` weights.
        even_range: symmetric grids without clip search have ``2**bits - 1`` steps from the largest magnitude's negative
            to it, and no code for either.
        float_zeros: zero points of asymmetric grids need not be codes; they are stored in half precision.
        keep_zeros: weights that are exactly 0 stay so, whatever a method would make of them: they were pruned. Not with
            ``float_zeros``, which have no code for 0.
    """

    bits: int
    group_size: int | None
    symmetric: bool
    clip_search: bool
    integer_products: bool = False
    codebook: str | None = None
    block_rows: int = 1
    even_range: bool = False
    float_zeros: bool = False
    keep_zeros: bool = False

    def columns_per_group(self, columns: int) -> int:
        """The group size for a weight of so many columns: even, and such that a group fills whole bytes."""
        size = columns if self.group_size is None else self.group_size
        return size + -size % max(2, codes_per_unit(self.bits))

    def fit(
        self, weights: torch.Tensor, importance: torch.Tensor | None = None, *, clip_search: bool | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero point of groups of weights.

        Args:
            weights: ``[..., group]`` float32. Where rows share scales the first dimension is the rows, from the first
                of a block on.
            importance: ``[group]`` or broadcastable; weight of each column's squared error.
            clip_search: instead of the format's own.

        Returns:
            scales ``[...]``, never 0, as they will be stored, and zero points ``[...]`` as floats.
        """
        search = self.clip_search if clip_search is None else clip_search
        if self.block_rows > 1:
            return self._fit_blocks(weights, importance, search)
        scale, zero = self._fit(weights, importance, search)
        return self.stored(scale).to(torch.float32), self.stored_zeros(zero).to(torch.float32)

    def _fit(
        self, weights: torch.Tensor, importance: torch.Tensor | None, search: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.codebook is not None:
            scale = fit_codebook(weights, self.codebook, clip_search=search, importance=importance)
            return scale, torch.full_like(scale, codebook(self.codebook).zero)
        return fit_grid(
            weights.contiguous(),
            bits=self.bits,
            symmetric=self.symmetric,
            clip_search=search,
            importance=importance,
            full_range=not self.integer_products,
            even_range=self.even_range,
            whole_zeros=not self.float_zeros,
        )

    def _fit_blocks(
        self, weights: torch.Tensor, importance: torch.Tensor | None, search: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Fit the rows of a block as if they were one; the last block may be lower."""
        rows, step = len(weights), self.block_rows
        whole = rows - rows % step
        spread = importance.expand_as(weights) if importance is not None else None
        found = []
        for piece, height in ((slice(0, whole), step), (slice(whole, rows), rows - whole)):
            if piece.start == piece.stop:
                continue

            def beside(values: torch.Tensor, piece: slice = piece, height: int = height) -> torch.Tensor:
                blocks: torch.Tensor = values[piece].unflatten(0, (-1, height))
                return blocks.movedim(1, -2).flatten(-2)

            pair = self._fit(beside(weights), beside(spread) if spread is not None else None, search)
            found.append([value.repeat_interleave(height, 0) for value in pair])
        scale, zero = (torch.cat(parts) for parts in zip(*found, strict=True))
        return self.stored(scale).to(torch.float32), self.stored_zeros(zero).to(torch.float32)

    def stored(self, scales: torch.Tensor) -> torch.Tensor:
        """Scales in the dtype that they are stored in."""
        if self.integer_products:
            return scales
        size = scales.abs()
        fits = bool(((size >= _HALF.tiny) & (size <= _HALF.max)).all())
        return scales.to(torch.float16) if fits else scales

    def stored_zeros(self, zeros: torch.Tensor) -> torch.Tensor:
        """Zero points in the dtype that they are stored in: a step of half precision is a small part of a code."""
        return zeros.to(torch.float16) if self.float_zeros else zeros.to(torch.uint8)

    def round(self, weights: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        """Codes nearest to weights ``[..., group]``, as floats; ``scale`` and ``zero`` are ``[...]``."""
        if self.codebook is not None:
            return nearest_codes(weights / scale.unsqueeze(-1), codebook(self.codebook)).to(torch.float32)
        if self.float_zeros:
            steps = torch.addcdiv(zero.unsqueeze(-1), weights, scale.unsqueeze(-1))
            return steps.round_().clamp_(0.0, float(2**self.bits - 1))
        lowest = 1.0 if self.integer_products else 0.0
        return round_to_grid(weights, scale, zero, self.bits, lowest=lowest)

    def values(self, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        """What codes ``[..., group]`` stand for, float32; ``scale`` and ``zero`` are ``[...]``."""
        if self.codebook is not None:
            values: torch.Tensor = codebook(self.codebook).table[codes.to(torch.int32)]
            return values.mul_(scale.unsqueeze(-1))
        return (codes - zero.unsqueeze(-1)).mul_(scale.unsqueeze(-1))
