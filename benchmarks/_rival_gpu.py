"""Rivals on a GPU as calls to be timed: torchao's quantised linears, and how long any rival may take to begin."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import nn

Calls = Sequence[Callable[[], object]]

# Kinds of linears that torchao makes.
KINDS = ("int4", "int4 plain", "int8", "fp8")


def torchao_config(kind: str, group_size: int = 128) -> Any:
    """torchao's configuration of one of :data:`KINDS`.

    ``int4`` packs for tinygemm, which is part of torch; ``int4 plain`` is torchao's default, whose kernels are in
    another package (fbgemm or mslk).
    """
    from torchao import quantization

    if kind == "int4":
        return quantization.Int4WeightOnlyConfig(group_size=group_size, int4_packing_format="tile_packed_to_4d")
    if kind == "int4 plain":
        return quantization.Int4WeightOnlyConfig(group_size=group_size)
    if kind == "int8":
        return quantization.Int8DynamicActivationInt8WeightConfig()
    return quantization.Float8DynamicActivationFloat8WeightConfig(granularity=quantization.PerRow())


def torchao_linears(kind: str, x: torch.Tensor, outputs: int, count: int) -> Calls:
    """So many linears of torchao's on ``x``, compiled where torchao means them to be (rounded activations)."""
    from torchao.quantization import quantize_

    layers: list[Any] = []
    for _ in range(count):
        layer = nn.Linear(x.shape[-1], outputs, bias=False, dtype=x.dtype, device=x.device).requires_grad_(False)
        quantize_(layer, torchao_config(kind))
        layers.append(torch.compile(layer) if kind in ("int8", "fp8") else layer)
    return [partial(layer, x) for layer in layers]


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """End the block with a TimeoutError when it takes longer; between steps of Python's only."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"took longer than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
