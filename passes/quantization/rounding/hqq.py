"""HQQ: grids fitted to a weight without data, by a robust norm of the error.

Badri, Shaji: Half-Quadratic Quantization of Large Machine Learning Models (2023). The grid of a group is to make
``|W - Ŵ|_p`` small with ``p < 1``, which outliers move less than the squared error. With a second variable for the
error, ``|E|_p + β/2 |E - (W - Ŵ)|²``, each step has a closed form: ``E`` by shrinking ``W - Ŵ`` (their equation 6), and
the zero point as the mean of ``Ŵ``'s codes less those of ``W - E`` (their equation 8).

The published solver keeps the scale of the full range and stores zero points as floats, and ends when the mean error
of a weight no longer falls: so it is done for formats with ``float_zeros``. Elsewhere a zero point is a whole number:
both neighbours of the solver's are tried, and each group gets the one with the least objective,
``min_E |E|_p + β/2 |E - (W - Ŵ)|²``. Most of what the method gives is lost by that. ``fit_scale`` fits the scale to
``W - E`` as well: the weights come closer, but least squares make them smaller on the whole, which cost a small
language model more than it gave.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from graphwright.ir.errors import InputError
from graphwright.passes.quantization.formats import Format
from graphwright.passes.quantization.loss import Loss
from graphwright.passes.quantization.rounding.base import Codes, WeightRounding

# Elements worked on at once: temporaries stay in the cache.
_SLICE_ELEMENTS = 1 << 19
# Bits up to which scales are fitted unless that is decided.
_FEW_BITS = 2
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Hqq(WeightRounding):
    """HQQ (Badri and Shaji 2023); it looks at no data.

    Attributes:
        norm: ``p``, above 0 and at most 1.
        beta: how closely the second variable follows the error at first. Errors that are small beside ``1 / beta``
            count by their square.
        growth: what ``beta`` is multiplied with at each step.
        steps: how many there are.
        fit_scale: fit scales too, with those of the clip search among what is tried; symmetric grids change by nothing
            else. ``None``: at two bits, where the full range leaves most weights on one or two codes.
        whole_start: with zero points between codes, start from whole ones, as hqq does at 4 bits. The ends of the range
            are then no codes at first, and hardly ever become such.
    """

    method: ClassVar[str] = "hqq"
    norm: float = 0.7
    beta: float = 10.0
    growth: float = 1.01
    steps: int = 20
    fit_scale: bool | None = None
    whole_start: bool = False

    def __post_init__(self) -> None:
        for option, low, high in (("norm", 0.0, 1.0), ("beta", 0.0, 1e6), ("growth", 0.99, 10.0)):
            value = getattr(self, option)
            if not low < value <= high:
                raise InputError(f"must be above {low} and at most {high}, not {value!r}", where=f"hqq: {option}")
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise InputError(f"must be an integer, 1 or more, not {self.steps!r}", where="hqq: steps")

    def codes(self, weight: torch.Tensor, form: Format) -> Codes:
        """See the module; any format, of which only asymmetric ones have zero points to choose."""
        rows, columns = weight.shape
        size = form.columns_per_group(columns)
        groups = -(-columns // size)
        codes = torch.empty(rows, columns, dtype=torch.uint8)
        scales, zeros = torch.empty(rows, groups), torch.empty(rows, groups)
        loss = Loss()
        whole = columns // size
        with torch.no_grad():
            step = max(1, _SLICE_ELEMENTS // max(1, columns))
            for start in range(0, rows, step):
                down = slice(start, start + step)
                for first, last in ((0, whole), (whole, groups)):
                    if first == last:
                        continue
                    across = slice(first * size, min(last * size, columns))
                    piece = weight[down, across].to(torch.float32).unflatten(1, (last - first, -1)).contiguous()
                    scale, zero = self._grid(piece, form)
                    found = form.round(piece, scale, zero)
                    scales[down, first:last], zeros[down, first:last] = scale, zero
                    codes[down, across] = found.flatten(1).to(torch.uint8)
                    loss.add(form.values(found, scale, zero), piece)
        return Codes(codes, scales, zeros, loss)

    def _grid(self, weights: torch.Tensor, form: Format) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero point of groups ``[..., group]``."""
        wide, middle = form.fit(weights, clip_search=False)
        candidates = [(wide, middle)]
        if form.float_zeros:
            _, real = self._solve(weights, wide, middle.round() if self.whole_start else middle, form, move_zero=True)
            candidates = [(wide, form.stored_zeros(real).to(torch.float32))]
        elif not form.symmetric:
            _, real = self._solve(weights, wide, middle, form, move_zero=True)
            limit = float(2**form.bits - 1)
            candidates += [(wide, near.clamp(0, limit)) for near in (real.floor(), real.ceil())]
        if self.fit_scale or (self.fit_scale is None and form.bits <= _FEW_BITS):
            candidates.append(form.fit(weights, clip_search=True))
            candidates += [self._solve(weights, scale, zero, form) for scale, zero in candidates]
        return self._best(weights, candidates, form)

    def _solve(
        self, weights: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, form: Format, *, move_zero: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Half-quadratic steps from a grid: on the scale, or on the zero point (as a real number)."""
        beta, least = self.beta, math.inf
        for _ in range(self.steps):
            codes = form.round(weights, scale, zero)
            error = weights - form.values(codes, scale, zero)
            kept = weights - self._shrink(error, beta)
            if move_zero:
                zero = (codes - kept / scale.unsqueeze(-1)).mean(-1)
                mean = float(error.abs().mean()) if form.float_zeros else 0.0
                if form.float_zeros and mean >= least:
                    break
                least = mean
            else:
                units = form.values(codes, torch.ones_like(scale), zero)
                fitted = (units * kept).sum(-1) / units.square().sum(-1).clamp_min(_TINY)
                scale = torch.where((fitted * scale > 0) & (fitted.abs() >= _TINY), fitted, scale)
            beta *= self.growth
        return (scale if move_zero else form.stored(scale).to(torch.float32)), zero

    def _shrink(self, error: torch.Tensor, beta: float) -> torch.Tensor:
        size = error.abs()
        # A power below 0 of 0 is infinite, and leaves 0.
        return torch.sign(error) * (size - size.pow(self.norm - 1) / beta).clamp_min_(0)

    def _best(
        self, weights: torch.Tensor, candidates: list[tuple[torch.Tensor, torch.Tensor]], form: Format
    ) -> tuple[torch.Tensor, torch.Tensor]:
        best, scales, zeros = torch.full_like(candidates[0][0], torch.inf), *candidates[0]
        for scale, zero in candidates:
            error = weights - form.values(form.round(weights, scale, zero), scale, zero)
            taken = self._shrink(error, self.beta)
            objective = (taken.abs().pow_(self.norm) + (error - taken).square_().mul_(self.beta / 2)).sum(-1)
            better = objective < best
            best = torch.where(better, objective, best)
            scales, zeros = torch.where(better, scale, scales), torch.where(better, zero, zeros)
        return scales, zeros
