"""Decoding on the executor whose later tokens run through fewer layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from graphwright.backends.cpu.executor.assembly import Assembled
from graphwright.backends.cpu.executor.session import CpuSession
from graphwright.backends.depth import Depths
from graphwright.ir.decoder import DecoderLayout


class CpuScheduled(CpuSession):
    """Instructions for every depth, on the same weights and the same caches.

    Args:
        assembled: the instructions of so many layers.
        layout: of the decoder.
        depths: of the rows of every step.
        slots: sequences held at a time.
        capacity: tokens that each can hold.
        cache: ``"float32"``, ``"bfloat16"`` or ``"int8"``.

    Raises:
        InputError: there are no slots or no capacity.
    """

    def __init__(
        self,
        assembled: Callable[[int], Assembled],
        layout: DecoderLayout,
        depths: Depths,
        *,
        slots: int,
        capacity: int,
        cache: str,
    ) -> None:
        super().__init__(assembled(depths.layers), layout, slots=slots, capacity=capacity, cache=cache)
        self._of_depth, self.depths = assembled, depths
        self._runners: dict[int, tuple[Assembled, Any]] = {depths.layers: (self._assembled, self._runner)}

    def _step(
        self, tokens: torch.Tensor, slots: torch.Tensor, starts: torch.Tensor, rows: torch.Tensor
    ) -> torch.Tensor:
        chosen = self.depths.rows(tokens, slots, starts)
        if len(chosen) == 1:
            self._take(next(iter(chosen)))
            return super()._step(tokens, slots, starts, rows)
        logits = torch.empty(*rows.shape, self.layout.vocabulary)
        for depth, at in chosen.items():
            self._take(depth)
            logits[at] = super()._step(tokens[at], slots[at], starts[at], rows[at])
        return logits

    def _take(self, depth: int) -> None:
        """Let the next step run so many layers."""
        from graphwright.backends.cpu import _native  # not at the top: it may be absent

        if depth not in self._runners:
            assembled = self._of_depth(depth)
            runner = _native.Runner(assembled.executor)
            for name, number in assembled.bound.items():
                runner.bind(number, self._caches[name])
            self._runners[depth] = assembled, runner
        self._assembled, self._runner = self._runners[depth]

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` positions of one slot to another."""
        super().copy(source, target, length)
        self.depths.copied(source, target, length)
