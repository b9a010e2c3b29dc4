"""What rounding cost a layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

# Layers named in the report as the least exact.
_NAMED = 3


@dataclass
class Loss:
    """Squared error and squared size, summed.

    Of the weights when they were rounded to the nearest, which is all there is to go by; of the outputs on the
    calibration data with GPTQ, which moves the weights further in order to keep the outputs.
    """

    error: float = 0.0
    size: float = 0.0

    def add(self, rounded: torch.Tensor, exact: torch.Tensor) -> None:
        """Count some more values; ``rounded`` is overwritten."""
        flat = exact.flatten()
        difference = rounded.sub_(exact).flatten()
        self.error += float(difference @ difference)
        self.size += float(flat @ flat)

    @classmethod
    def of_outputs(cls, rounded: torch.Tensor, exact: torch.Tensor, second_moment: torch.Tensor) -> Loss:
        """Of ``X Wᵀ`` over the data whose second moment is ``Σ x xᵀ``; ``rounded`` is overwritten."""
        moment = second_moment.to(torch.float32)
        moved, wide = rounded.sub_(exact), exact.to(torch.float32)
        error, size = (float(((matrix @ moment) * matrix).sum()) for matrix in (moved, wide))
        return cls(max(error, 0.0), max(size, 0.0))

    @property
    def relative(self) -> float:
        """Root mean square error, as a fraction of the root mean square; 0 for nothing but zeros."""
        return math.sqrt(self.error / self.size) if self.size > 0 else 0.0

    @property
    def sqnr_db(self) -> float:
        """Signal to quantisation noise in decibels; infinite without noise."""
        return -20 * math.log10(self.relative) if self.relative > 0 else math.inf


def report_entries(losses: Mapping[str, Loss]) -> dict[str, Any]:
    """What a pass notes of the losses of its weights, by name: the least exact in words, all of them in numbers."""
    worst = sorted(losses, key=lambda name: losses[name].sqnr_db)[:_NAMED]
    words = [f"{name} {losses[name].sqnr_db:.1f} dB" for name in worst]
    return {
        "least_exact": ", ".join(words),
        "weights": {name: {"relative": loss.relative, "sqnr_db": loss.sqnr_db} for name, loss in losses.items()},
    }
