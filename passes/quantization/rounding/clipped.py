"""Rounding to the nearest code of ranges that were chosen by what clipping does to the outputs.

Lin et al. 2023, "AWQ", and its authors' code: the range of every group of weights is shrunk step by step, and the one
whose share of the output errs least is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from graphwright.ir.errors import InputError
from graphwright.passes.calibration import Observed
from graphwright.passes.quantization.finite import is_finite
from graphwright.passes.quantization.formats import Format
from graphwright.passes.quantization.loss import Loss
from graphwright.passes.quantization.rounding.base import Codes, InputRounding


@dataclass(frozen=True)
class ClippedNearest(InputRounding):
    """Nearest codes, with the range of each group chosen by the error of the outputs (Lin et al. 2023).

    The error of a group's share of the output over all calibration rows is ``d M dᵀ``, with ``d`` what rounding does to
    the group's weights and ``M`` the second moment of its inputs, so no rows are needed.

    Attributes:
        steps: how many ranges are tried, evenly from the full one downwards.
        least: the smallest range is above this fraction of the full one.
    """

    method: ClassVar[str] = "awq-clip"
    steps: int = 10
    least: float = 0.5

    def __post_init__(self) -> None:
        if isinstance(self.steps, bool) or self.steps < 1:
            raise InputError(f"must be at least 1, not {self.steps!r}", where="awq-clip: steps")
        if not 0.0 < self.least < 1.0:
            raise InputError(f"must be between 0 and 1, not {self.least!r}", where="awq-clip: least")

    def codes(self, weight: torch.Tensor, form: Format, inputs: Observed) -> Codes:
        """See :class:`ClippedNearest`."""
        moment = inputs.moment
        if not is_finite(moment):
            raise InputError("the calibration inputs hold NaN or infinity", hint="check the calibration data")
        rows, columns = weight.shape
        size = form.columns_per_group(columns)
        starts = range(0, columns, size)
        codes = torch.empty(rows, columns, dtype=torch.uint8)
        scales, zeros = torch.empty(rows, len(starts)), torch.empty(rows, len(starts))
        exact = weight.detach().to(torch.float32)
        rounded = torch.empty_like(exact)
        for group, start in enumerate(starts):
            span = slice(start, min(start + size, columns))
            scale, zero = self._range(exact[:, span], form, moment[span, span])
            found = form.round(exact[:, span], scale, zero)
            codes[:, span] = found.to(torch.uint8)
            rounded[:, span] = form.values(found, scale, zero)
            scales[:, group], zeros[:, group] = scale, zero
        return Codes(codes, scales, zeros, Loss.of_outputs(rounded, exact, moment))

    def _range(self, weights: torch.Tensor, form: Format, moment: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero point of a group, ``[rows]`` each."""
        top = weights.abs().amax(-1, keepdim=True)
        best, scale, zero = torch.full((len(weights),), float("inf")), torch.empty(0), torch.empty(0)
        for step in range(self.steps):
            limit = top * (1 - (1 - self.least) * step / self.steps)
            clipped = torch.maximum(torch.minimum(weights, limit), -limit)
            tried = form.fit(clipped, clip_search=False)
            moved = form.values(form.round(weights, *tried), *tried).sub_(weights)
            error = ((moved @ moment) * moved).sum(-1)
            better = error < best
            best = torch.where(better, error, best)
            scale = torch.where(better, tried[0], scale) if step else tried[0]
            zero = torch.where(better, tried[1], zero) if step else tried[1]
        return scale, zero
