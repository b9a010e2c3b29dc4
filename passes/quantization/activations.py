"""Which grid the inputs of a linear are quantised on: fixed beforehand where that is as exact, one per token elsewhere.

A fixed ("static") grid costs next to nothing as the model runs. It suffers from features that are much larger than the
others; those are tamed by a scale for every feature, moved into the weights (Xiao et al. 2023, "SmoothQuant", eq. 4).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from graphwright.ir.errors import InputError
from graphwright.ir.ops.quantization import quantize_activations
from graphwright.passes.calibration import Observed

# Migration strengths tried; None for one scale for all features.
_STRENGTHS = (None, 0.5, 0.65, 0.8)
# Error of a linear's outputs up to which static grids are taken for granted: 8-bit rounding itself makes 1 to 2 %.
_SMALL_ERROR = 0.02
# Fractions of the observed range tried. What lies beyond is clipped.
_RANGES = (1.0, 0.92, 0.84, 0.7)
# Output channels that roundings are compared on.
_CHANNELS = 256
_LEVELS = 255
# Against the largest feature or column; smaller ones are scaled like this, so that no scale is 0 or huge.
_LEAST = 1e-4


@dataclass(frozen=True)
class StaticGrid:
    """``x_k ≈ (code - zero point) · scales_k``.

    Attributes:
        scales: ``[features]`` float32, positive.
        zero_point: in 0..255.
        error: of the linear's outputs on the calibration rows, root mean square, relative to theirs.
    """

    scales: torch.Tensor
    zero_point: int
    error: float


def static_grid(inputs: Observed, weight: torch.Tensor) -> StaticGrid:
    """The static grid with the least error of the linear's outputs, weights rounded to the nearest of INT8.

    Args:
        inputs: what the linear sees.
        weight: ``[out, features]``, floating.

    Raises:
        InputError: the calibration data lead to NaN or infinity here.
    """
    if not bool(torch.isfinite(inputs.low).all() and torch.isfinite(inputs.high).all()):
        raise InputError("is NaN or infinite on the calibration data")
    sample = _channels(weight)
    wanted = inputs.rows @ sample.T
    best: StaticGrid | None = None
    for strength in _STRENGTHS:
        factors = _smoothing(inputs, weight, strength)
        rounded = _rounded(sample * factors)
        low = min(0.0, float((inputs.low / factors).min()))
        high = max(0.0, float((inputs.high / factors).max()))
        if high <= low:
            low, high = 0.0, 1.0  # nothing but zeros: any grid that has a zero
        for part in _RANGES:
            step = part * (high - low) / _LEVELS
            zero = round(-low * part / step)
            codes = (inputs.rows / (factors * step)).round_().clamp_(-zero, _LEVELS - zero)
            error = _relative((codes @ rounded.T).mul_(step), wanted)
            if best is None or error < best.error:
                best = StaticGrid(factors * step, zero, error)
    assert best is not None
    return best


@dataclass(frozen=True)
class GridChoice:
    """Whether the inputs of a linear get a static grid.

    Attributes:
        always: they do; else only where its error is small, or no larger than that of grids made for each token.
    """

    always: bool

    def choose(self, inputs: Observed, weight: torch.Tensor) -> StaticGrid | None:
        """The grid, or ``None`` for one per token; see :func:`static_grid`."""
        grid = static_grid(inputs, weight)
        if self.always or grid.error <= _SMALL_ERROR or grid.error <= per_token_error(inputs, weight):
            return grid
        return None


def per_token_error(inputs: Observed, weight: torch.Tensor) -> float:
    """The error, as :class:`StaticGrid` measures it, of grids made for each row as it comes."""
    sample = _channels(weight)
    codes, scale, zero = quantize_activations(inputs.rows, "per_token")
    return _relative(((codes - zero) * scale) @ _rounded(sample).T, inputs.rows @ sample.T)


def _smoothing(inputs: Observed, weight: torch.Tensor, strength: float | None) -> torch.Tensor:
    if strength is None:
        return torch.ones_like(inputs.low)
    largest = torch.maximum(inputs.high.abs(), inputs.low.abs())
    columns = weight.detach().abs().amax(0).to(torch.float32)
    factors = _bounded(largest) ** strength / _bounded(columns) ** (1 - strength)
    return factors / factors.mean()


def _bounded(values: torch.Tensor) -> torch.Tensor:
    top = float(values.max())
    return values.clamp(min=_LEAST * top) if top > 0 else torch.ones_like(values)


def _channels(weight: torch.Tensor) -> torch.Tensor:
    return weight.detach()[:: -(-len(weight) // _CHANNELS)].to(torch.float32)


def _rounded(weight: torch.Tensor) -> torch.Tensor:
    scale = weight.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / 127
    return (weight / scale).round_().mul_(scale)


def _relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Of all rows together: what a linear gives is mostly added to a stream whose rows are alike in size.

    Errors relative to each row's own output foretell those of the model badly (tried on MiniLM).
    """
    size = float(wanted.square().sum())
    return (float((found - wanted).square().sum()) / size) ** 0.5 if size > 0 else 0.0
