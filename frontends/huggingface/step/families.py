"""Model families whose attention does not go through transformers' attention interface."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from graphwright.frontends.huggingface.step import bloom, falcon, mpt


@dataclass(frozen=True)
class Family:
    """How one family attends.

    Attributes:
        forward: takes the place of its attention's forward.
        slopes: those of ALiBi, from the model.
        error: how far the original's own rounding may put the logits off, relative to their root mean square.
    """

    forward: Callable[..., Any]
    slopes: Callable[[Any], torch.Tensor | None]
    error: float = 0.0


# Class of the attention -> its family. Falcon rounds positions times slopes to bfloat16; they are exact here.
FAMILIES: dict[str, Family] = {
    "FalconAttention": Family(falcon.forward, falcon.slopes, error=2e-2),
    "MptAttention": Family(mpt.forward, mpt.slopes),
    "BloomAttention": Family(bloom.forward, bloom.slopes),
}


def family_of(model: Any) -> Family | None:
    """The family of a model, or ``None`` if it should use transformers' attention interface."""
    found = {type(module).__name__ for module in model.modules()} & set(FAMILIES)
    return FAMILIES[found.pop()] if found else None
