"""Decoding by stages on the executor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from graphwright.backends.cpu.executor.assembly import Assembled
from graphwright.backends.cpu.executor.python_calls import set_sizes
from graphwright.backends.cpu.executor.session import bound_caches, contiguous
from graphwright.backends.pipeline import PipelineSession
from graphwright.backends.session import StepCancelled
from graphwright.ir.stages import INPUTS, Stage


class CpuPipeline(PipelineSession):
    """A stage's instructions, with caches of some slots for every repetition.

    Args:
        assembled: the stage.
        stage: what it was made of.
        slots: sequences held at a time.
        capacity: tokens that each can hold.
        cache: ``"float32"``, ``"bfloat16"`` or ``"int8"``.

    Raises:
        InputError: there are no slots or no capacity.
    """

    def __init__(self, assembled: Assembled, stage: Stage, *, slots: int, capacity: int, cache: str) -> None:
        from graphwright.backends.cpu import _native  # not at the top: it may be absent

        super().__init__(stage.layout, repeats=stage.repeats, width=stage.width, slots=slots, capacity=capacity)
        self.cache = cache
        self._assembled, self._runner = assembled, _native.Runner(assembled.executor)
        self._cancelled = _native.Cancelled
        self._first = np.zeros((slots * stage.repeats, 1), np.int64)
        keys, values = stage.layout.keys[: stage.layers], stage.layout.values[: stage.layers]
        self._caches = bound_caches(assembled, keys, values, slots * stage.repeats, capacity, cache)
        for name, number in assembled.bound.items():
            self._runner.bind(number, self._caches[name])

    def cancel(self) -> None:
        """Make a stage that another thread is in end before its next instruction, by :class:`StepCancelled`."""
        self._runner.cancel()

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys, values and scales, all slots filled."""
        return sum(cache.nbytes for cache in self._caches.values())

    def _stage(
        self,
        tokens: torch.Tensor,
        hidden: torch.Tensor,
        is_new: torch.Tensor,
        slots: torch.Tensor,
        starts: torch.Tensor,
        rows: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        given = (tokens, hidden, is_new, slots, starts, rows)
        logits, after = self._run(*(contiguous(each) for each in given))
        return torch.from_numpy(logits), torch.from_numpy(after)

    def stage_tokens(
        self,
        tokens: Sequence[int],
        hidden: npt.NDArray[np.float32],
        repetitions: Sequence[int],
        slots: Sequence[int],
        starts: Sequence[int],
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """See :meth:`PipelineSession.stage_tokens`; without tensors, whose making takes longer than a small kernel."""
        count, repeats, limit = len(tokens), self.repeats, min(self.capacity, self.layout.length or self.capacity)
        inner = [slot * repeats + repetition for slot, repetition in zip(slots, repetitions, strict=True)]
        is_good = (
            hidden.shape == (count, self.width)
            and 0 < count == len(set(inner))
            and all(0 <= token < self.layout.vocabulary for token in tokens)
            and all(0 <= repetition < repeats for repetition in repetitions)
            and all(0 <= slot < self.slots for slot in slots)
            and all(0 <= start < limit for start in starts)
        )
        if not is_good:  # there it says what is wrong
            return super().stage_tokens(tokens, hidden, repetitions, slots, starts)
        numbers = np.array((tokens, inner, starts), np.int64)
        is_new = np.array(repetitions) == 0
        logits, after = self._run(
            numbers[0].reshape(count, 1),
            np.ascontiguousarray(hidden).reshape(count, 1, -1),
            is_new,
            numbers[1],
            numbers[2],
            self._first[:count],
        )
        return logits.reshape(count, -1), after.reshape(count, -1)

    def _run(self, *arrays: npt.NDArray[Any]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Run on what :data:`INPUTS` names, in their order."""
        given = dict(zip(INPUTS, arrays, strict=True))
        batch, length = arrays[0].shape
        sizes = {"batch": batch, "tokens": length, "selected": arrays[-1].shape[1]}
        set_sizes({**sizes, "slots": self.slots * self.repeats, "capacity": self.capacity})
        try:
            logits, after = self._runner.run([given[name] for name in self._assembled.inputs], torch.get_num_threads())
        except self._cancelled:
            raise StepCancelled("the stage was cancelled") from None
        # It lies where the next stage computes, and is read by it.
        return logits, after.copy()

    def _copy(self, source: int, target: int, length: int) -> None:
        for cache in self._caches.values():
            cache[target, :, :length] = cache[source, :, :length]
