"""Decoding steps as CUDA graphs: recorded once for a shape, launched whole from then on."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

# Steps of at most so many tokens in all are recorded: longer ones take long enough to launch kernel by kernel.
LONGEST = 64
# Shapes that are kept.
_MOST = 16

Step = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class _Recorded:
    graph: Any
    inputs: tuple[torch.Tensor, ...]
    output: torch.Tensor


class StepGraphs:
    """Runs steps, those of few tokens from recordings.

    A step must read and write the same memory every time except for its inputs, must not wait for the GPU, and must do
    no harm when it is run several times in a row: caches are written at the positions that the inputs say.

    Args:
        step: of tensors on the GPU.
        device: a GPU.
    """

    def __init__(self, step: Step, device: torch.device) -> None:
        self._step, self._device = step, device
        self._recorded: OrderedDict[tuple[tuple[int, ...], ...], _Recorded] = OrderedDict()
        self._pool: Any = None

    def run(self, *inputs: torch.Tensor) -> torch.Tensor:
        """The step's result; overwritten by the next step of the same shapes.

        Args:
            inputs: on the CPU or on the GPU; the first has a number for each token.
        """
        if inputs[0].numel() > LONGEST:
            return self._step(*(each.to(self._device) for each in inputs))
        shapes = tuple(tuple(each.shape) for each in inputs)
        if shapes not in self._recorded:
            self._recorded[shapes] = self._record(inputs)
            if len(self._recorded) > _MOST:
                self._recorded.popitem(last=False)
        self._recorded.move_to_end(shapes)
        found = self._recorded[shapes]
        for target, value in zip(found.inputs, inputs, strict=True):
            target.copy_(value)
        found.graph.replay()
        return found.output

    def _record(self, inputs: tuple[torch.Tensor, ...]) -> _Recorded:
        own = tuple(each.to(self._device, copy=True) for each in inputs)
        # Kernels are compiled, and libraries set up, outside the recording.
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._step(*own)
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            output = self._step(*own)
        self._pool = graph.pool()
        return _Recorded(graph, own, output)
