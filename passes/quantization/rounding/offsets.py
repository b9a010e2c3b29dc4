"""A weight whose rounding and scales are trained: what a step changes, and the weight that comes of it."""

from __future__ import annotations

import torch
from torch.nn import functional

from graphwright.passes.quantization.formats import Format
from graphwright.passes.quantization.grids import TINY
from graphwright.passes.quantization.loss import Loss
from graphwright.passes.quantization.rounding.base import Codes

# How far a trained range goes from the one that was fitted.
_LEAST, _MOST = 0.5, 1.5
# Where the choice of another method is least certain: a little inside the middle between two codes.
_EDGE = 0.499


def round_through(values: torch.Tensor) -> torch.Tensor:
    """Rounded to integers, with the gradient of the identity (straight-through, Bengio et al. 2013)."""
    return values + (values.round() - values).detach()


class TrainedRounding:
    """``Ŵ = s (clip(⌊W / s + V⌉ + z) - z)`` with trainable ``V``, and ``s`` and ``z`` from trainable ends of the range.

    Cheng et al. 2023, "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs", eq. 3 to 5.
    Symmetric formats have one multiplier per group, asymmetric ones one for each end of the range. The multipliers are
    of the range that the format fits, which is the full one unless it searches for the clip.

    Attributes:
        offsets: ``V``, ``[rows, groups, group]``, in steps of the grid.
        high: multiplier of the range, or of its upper end, ``[rows, groups]``.
        low: multiplier of its lower end; the same tensor as ``high`` for symmetric formats.
        reach: largest offset.
    """

    def __init__(
        self, weight: torch.Tensor, form: Format, *, importance: torch.Tensor | None = None, reach: float = 0.5
    ) -> None:
        """Start from rounding to the nearest.

        Args:
            weight: ``[rows, columns]``, floating.
            form: the format.
            importance: ``[columns]``: weight of each column's squared error as the ranges are fitted.
            reach: largest offset.
        """
        self.form, self.reach, self.columns = form, reach, weight.shape[1]
        self.exact = weight.detach().to(torch.float32)
        self._kept = self._grouped((self.exact != 0).to(torch.float32)) if form.keep_zeros else None
        self.latent = self._grouped(self.exact)
        known = self._grouped(importance.unsqueeze(0)).squeeze(0) if importance is not None else None
        self._fitted, self._zero = form.fit(self.latent, known)
        self.offsets = torch.zeros_like(self.latent)
        self.high = torch.ones_like(self._fitted)
        self.low = self.high if form.symmetric else torch.ones_like(self._fitted)

    def start_from(self, found: Codes) -> None:
        """Start from codes of another method: weights that it did not round to the nearest move to the edge of its
        choice, from where a small offset takes them back."""
        self._fitted, self._zero = found.scales.clone(), found.zeros.clone()
        scale = self._fitted.unsqueeze(-1)
        codes = self._grouped(found.codes.to(torch.float32))
        steps, (least, most) = codes - self._zero.unsqueeze(-1), self._ends()
        lower = torch.where(codes <= least, -torch.inf, steps - _EDGE)
        upper = torch.where(codes >= most, torch.inf, steps + _EDGE)
        self.latent = (self._grouped(self.exact) / scale).clamp(lower, upper) * scale

    def parameters(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Offsets, and multipliers of ranges."""
        return [self.offsets], [self.high] if self.form.symmetric else [self.high, self.low]

    def bound(self) -> None:
        """Bring the parameters back into their bounds."""
        self.offsets.clamp_(-self.reach, self.reach)
        self.high.clamp_(_LEAST, _MOST)
        self.low.clamp_(_LEAST, _MOST)

    def grid(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scales, never 0, and zero points, ``[rows, groups]``."""
        if self.form.symmetric:
            return self._fitted * self.high, self._zero
        most = float(2**self.form.bits - 1)
        below, above = self._zero * self._fitted * self.low, (most - self._zero) * self._fitted * self.high
        scale = (above + below) / most
        scale = torch.where(scale.abs() < TINY, torch.ones_like(scale), scale)
        return scale, round_through(below / scale).clamp(0.0, most)

    def codes(self, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        """Codes as floats, ``[rows, groups, group]``."""
        steps = round_through(self.latent / scale.unsqueeze(-1) + self.offsets)
        if self._kept is not None:
            steps = steps * self._kept
        return (steps + zero.unsqueeze(-1)).clamp(*self._ends())

    def dense(self) -> torch.Tensor:
        """The rounded weight ``[rows, columns]`` float32; gradients flow to the parameters that ask for them."""
        scale, zero = self.grid()
        return self.form.values(self.codes(scale, zero), scale, zero).flatten(1)[:, : self.columns]

    def backward(self, grad: torch.Tensor) -> None:
        """Give the parameters their gradients, from that of the rounded weight."""
        parameters = [each for group in self.parameters() for each in group]
        for each in parameters:
            each.requires_grad_()
        with torch.enable_grad():
            self.dense().backward(grad)
        for each in parameters:
            each.requires_grad_(False)

    def found(self) -> Codes:
        """The codes as they are now; the loss is that of the weights."""
        with torch.no_grad():
            scale, zero = self.grid()
            codes = self.codes(scale, zero).flatten(1)[:, : self.columns].to(torch.uint8)
            stored, loss = self.form.stored(scale).to(torch.float32), Loss()
            values = (codes - _spread(zero, self.form, self.columns)) * _spread(stored, self.form, self.columns)
            loss.add(values, self.exact)
        return Codes(codes, stored, zero.detach().clone(), loss)

    def _ends(self) -> tuple[float, float]:
        return 1.0 if self.form.integer_products else 0.0, float(2**self.form.bits - 1)

    def _grouped(self, values: torch.Tensor) -> torch.Tensor:
        """``[rows, columns]`` as ``[rows, groups, group]``, filled up with zeros."""
        group = self.form.columns_per_group(self.columns)
        filled = functional.pad(values, (0, -values.shape[1] % group))
        return filled.reshape(len(values), -1, group)


def _spread(values: torch.Tensor, form: Format, columns: int) -> torch.Tensor:
    """A value per group ``[rows, groups]`` for each of its columns."""
    return values.repeat_interleave(form.columns_per_group(columns), dim=1)[:, :columns]
