"""Decoding in plain PyTorch."""

from __future__ import annotations

import torch

from graphwright.backends.session import Session
from graphwright.ir.decoder import DecoderLayout
from graphwright.ir.errors import InputError
from graphwright.ir.program import Program
from graphwright.ir.types import TensorType


class ReferenceSession(Session):
    """A step program run as it is; its caches have the model's dtype and are copied at each step.

    Args:
        program: a decoding step.
        slots: sequences held at a time.
        capacity: tokens that each can hold.

    Raises:
        ProgramError: the program is not a decoding step.
        InputError: there are no slots or no capacity.
    """

    cache = "float32"

    def __init__(self, program: Program, *, slots: int, capacity: int) -> None:
        if slots < 1 or capacity < 1:
            raise InputError(f"needs slots and capacity, not {slots} and {capacity}", where="session")
        self.program, self.layout = program, DecoderLayout.of(program)
        self.slots, self.capacity = slots, capacity
        dtypes = [
            kind.dtype for kind in map(program.type_of, self.layout.caches(program)) if isinstance(kind, TensorType)
        ]
        shapes = (*self.layout.keys, *self.layout.values)
        self._caches = [
            torch.zeros(slots, heads, capacity, width, dtype=dtype)
            for (heads, width), dtype in zip(shapes, dtypes, strict=True)
        ]

    def _step(
        self, tokens: torch.Tensor, slots: torch.Tensor, starts: torch.Tensor, rows: torch.Tensor
    ) -> torch.Tensor:
        with torch.no_grad():
            logits, *caches = self.program.body(tokens, slots, starts, rows, *self._caches, *self._weights(slots))
        self._caches = caches
        result: torch.Tensor = logits.float()
        return result

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` positions of one slot to another."""
        for cache in self._caches:
            cache[target, :, :length] = cache[source, :, :length]
