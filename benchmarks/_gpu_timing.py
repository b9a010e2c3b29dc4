"""Times on a GPU: many calls recorded as one CUDA graph, on operands that the L2 cache cannot hold, between events."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch

# Bytes over which operands take turns: several times any L2 cache.
COLD_BYTES = 512 << 20
REPEATS = 15


def copies_of(nbytes: int) -> int:
    """How many copies of an operand of so many bytes take turns."""
    return max(2, min(64, -(-COLD_BYTES // max(nbytes, 1))))


def median_ms(calls: Sequence[Callable[[], object]]) -> float:
    """Milliseconds of one call: the median over replays of all of them in a row, without Python between kernels."""
    for call in calls:  # kernels are compiled, libraries set up
        call()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for _ in range(3):
        graph.replay()
    spent: list[float] = []
    for _ in range(REPEATS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        spent.append(start.elapsed_time(stop) / len(calls))
    return float(statistics.median(spent))


class Limits:
    """What the GPU gives, measured in this run.

    Attributes:
        copy: bytes a second, reads plus writes.
        read: bytes a second.
        matmul: multiply-accumulates a second in bfloat16.
    """

    def __init__(self) -> None:
        device = torch.device("cuda")
        source = torch.ones(1 << 28, dtype=torch.float32, device=device)
        target = torch.empty_like(source)
        self.copy = 2 * source.nbytes / median_ms([lambda: target.copy_(source)]) * 1e3
        self.read = max(self.copy, source.nbytes / median_ms([source.sum]) * 1e3)
        size = 8192
        a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
        self.matmul = size**3 / median_ms([lambda: a @ b] * 2) * 1e3

    def read_ms(self, nbytes: float) -> float:
        """Milliseconds to read so many bytes."""
        return nbytes / self.read * 1e3

    def copy_ms(self, nbytes: float) -> float:
        """Milliseconds to read and write so many bytes in all."""
        return nbytes / self.copy * 1e3

    def matmul_ms(self, macs: float) -> float:
        """Milliseconds of so many multiply-accumulates."""
        return macs / self.matmul * 1e3
