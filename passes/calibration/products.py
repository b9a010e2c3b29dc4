"""Products of float32 values that bfloat16 holds exactly."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def exact_products(rows: torch.Tensor) -> Iterator[None]:
    """Inside the block, products of float32 matrices run on the CPU's bfloat16 units where nothing is lost by it.

    Where each value is one of bfloat16, as the activations of a bfloat16 model are, their products are exact in
    float32, in which they are summed; that is two to three times as fast where the CPU has such units, and elsewhere it
    is not done.

    Args:
        rows: all that is multiplied inside the block, float32.
    """
    settings: Any = getattr(torch.backends.mkldnn, "matmul", None)
    has_units = bool(getattr(torch.cpu, "_is_avx512_bf16_supported", bool)())
    if not has_units or not hasattr(settings, "fp32_precision") or not _fits(rows):
        yield
        return
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


def _fits(rows: torch.Tensor) -> bool:
    """Whether bfloat16, the upper half of float32, holds every value."""
    if rows.dtype != torch.float32 or not rows.is_contiguous():
        return False
    return not any(bool((piece & 0xFFFF).any()) for piece in rows.view(torch.int32).view(-1).split(1 << 20))
