"""Looking for NaN and infinity in large tensors."""

from __future__ import annotations

import torch


def is_finite(values: torch.Tensor) -> bool:
    """Whether there is no NaN and no infinity, which the extremes would show; makes no tensor of that size."""
    return values.numel() == 0 or bool(torch.isfinite(torch.stack(values.detach().aminmax())).all())
