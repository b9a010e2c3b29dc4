"""Decoding by stages on the executor."""

from __future__ import annotations

import torch

from graphwright.backends.cpu.executor.assembly import Assembled
from graphwright.backends.cpu.executor.python_calls import set_sizes
from graphwright.backends.cpu.executor.session import bound_caches, contiguous
from graphwright.backends.pipeline import PipelineSession
from graphwright.backends.session import StepCancelled
from graphwright.ir.stages import Stage


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
        given = {
            "input_ids": tokens,
            "hidden": hidden,
            "is_new": is_new,
            "slots": slots,
            "starts": starts,
            "rows": rows,
        }
        sizes = {"batch": len(tokens), "tokens": tokens.shape[1], "selected": rows.shape[1]}
        set_sizes({**sizes, "slots": self.slots * self.repeats, "capacity": self.capacity})
        try:
            arrays = [contiguous(given[name]) for name in self._assembled.inputs]
            logits, after = self._runner.run(arrays, torch.get_num_threads())
        except self._cancelled:
            raise StepCancelled("the stage was cancelled") from None
        # It lies where the next stage computes, and is read by it.
        return torch.from_numpy(logits), torch.from_numpy(after.copy())

    def _copy(self, source: int, target: int, length: int) -> None:
        for cache in self._caches.values():
            cache[target, :, :length] = cache[source, :, :length]
