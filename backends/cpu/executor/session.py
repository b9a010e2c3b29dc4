"""Decoding on the executor: caches are written in place, nothing is allocated in a step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from graphwright.backends.cpu.executor.assembly import Assembled
from graphwright.backends.cpu.executor.python_calls import set_sizes
from graphwright.backends.session import CACHES, Session, StepCancelled
from graphwright.ir.decoder import ADAPTER_WEIGHTS, DecoderLayout
from graphwright.ir.errors import InputError


class CpuSession(Session):
    """A step's instructions, with caches of some slots.

    Args:
        assembled: the step.
        layout: of the decoder.
        slots: sequences held at a time.
        capacity: tokens that each can hold.
        cache: ``"float32"``, ``"bfloat16"`` or ``"int8"``.

    Raises:
        InputError: there are no slots or no capacity, or caches are not stored so.
    """

    def __init__(self, assembled: Assembled, layout: DecoderLayout, *, slots: int, capacity: int, cache: str) -> None:
        from graphwright.backends.cpu import _native  # not at the top: it may be absent

        if slots < 1 or capacity < 1:
            raise InputError(f"needs slots and capacity, not {slots} and {capacity}", where="session")
        self.layout, self.slots, self.capacity, self.cache = layout, slots, capacity, cache
        self._assembled, self._runner = assembled, _native.Runner(assembled.executor)
        self._cancelled = _native.Cancelled
        self._caches = bound_caches(assembled, layout.keys, layout.values, slots, capacity, cache)
        for name, number in assembled.bound.items():
            self._runner.bind(number, self._caches[name])

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` positions of one slot to another."""
        for cache in self._caches.values():
            cache[target, :, :length] = cache[source, :, :length]

    def cancel(self) -> None:
        """Make a step that another thread is in end before its next instruction, by raising :class:`StepCancelled`."""
        self._runner.cancel()

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys, values and scales, all slots filled."""
        return sum(cache.nbytes for cache in self._caches.values())

    @property
    def activation_bytes(self) -> int:
        """Bytes of the memory for activations."""
        return self._runner.arena_bytes

    @property
    def instructions(self) -> tuple[str, ...]:
        """The node that each instruction stands for."""
        return self._assembled.steps

    def profile(self, tokens: torch.Tensor, slots: torch.Tensor, starts: torch.Tensor, rows: torch.Tensor) -> list[int]:
        """Take a step, and give the nanoseconds of each instruction; errors as in :meth:`step`."""
        self._check(tokens, slots, starts, rows)
        return self._runner.profile(self._given(tokens, slots, starts, rows), torch.get_num_threads())

    def _step(
        self, tokens: torch.Tensor, slots: torch.Tensor, starts: torch.Tensor, rows: torch.Tensor
    ) -> torch.Tensor:
        given = self._given(tokens, slots, starts, rows)
        try:
            (logits,) = self._runner.run(given, torch.get_num_threads())
        except self._cancelled:
            raise StepCancelled("the step was cancelled") from None
        return torch.from_numpy(logits)

    def _given(
        self, tokens: torch.Tensor, slots: torch.Tensor, starts: torch.Tensor, rows: torch.Tensor
    ) -> list[np.ndarray]:
        given = {"input_ids": tokens, "slots": slots, "starts": starts, "rows": rows}
        given |= dict(zip([ADAPTER_WEIGHTS], self._weights(slots), strict=False))
        sizes = {"batch": len(tokens), "tokens": tokens.shape[1], "selected": rows.shape[1]}
        set_sizes({**sizes, "slots": self.slots, "capacity": self.capacity})
        return [contiguous(given[name]) for name in self._assembled.inputs]


def contiguous(tensor: torch.Tensor) -> np.ndarray:
    """A tensor as the executor takes it."""
    return np.ascontiguousarray(tensor.numpy())


def bound_caches(
    assembled: Assembled,
    keys: Sequence[tuple[int, int]],
    values: Sequence[tuple[int, int]],
    slots: int,
    capacity: int,
    cache: str,
) -> dict[str, np.ndarray]:
    """Memory for what instructions are bound to, by name.

    Args:
        assembled: the instructions.
        keys, values: heads and head dim of each layer.
        slots: of every cache.
        capacity: positions of a slot.
        cache: ``"float32"``, ``"bfloat16"`` or ``"int8"``.
    """
    shapes = {f"keys_{index}": shape for index, shape in enumerate(keys)}
    shapes |= {f"values_{index}": shape for index, shape in enumerate(values)}
    found: dict[str, np.ndarray] = {}
    for name in assembled.bound:
        heads, width = shapes[name.removesuffix(".scales")]
        shape = (slots, heads, capacity) if name.endswith(".scales") else (slots, heads, capacity, width)
        dtype = np.dtype("float32") if name.endswith(".scales") else _NUMPY[cache]
        # Memory comes as it is written to: a long cache that stays short costs little.
        found[name] = np.zeros(shape, dtype)
    return found


_NUMPY = {
    name: np.dtype("int16") if dtype == torch.bfloat16 else np.dtype(str(dtype).removeprefix("torch."))
    for name, dtype in CACHES.items()
}
