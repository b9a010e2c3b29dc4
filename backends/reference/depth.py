"""Decoding in plain PyTorch whose later tokens run through fewer layers."""

from __future__ import annotations

import torch

from graphwright.backends.depth import Depths, DepthSchedule
from graphwright.backends.reference.session import ReferenceSession
from graphwright.ir.program import Program
from graphwright.ir.truncation import layers_of, names_of_caches, truncated


class ReferenceScheduled(ReferenceSession):
    """A step program of which a token runs the first layers only, as a schedule says; norm and classifier follow.

    Args:
        program: a decoding step.
        schedule: depth by place, see :class:`~graphwright.backends.depth.Depths`.
        slots: sequences held at a time.
        capacity: tokens that each can hold.

    Raises:
        ProgramError: the program is not a decoding step, or has no repeated layers.
        InputError: there are no slots or no capacity.
    """

    def __init__(self, program: Program, schedule: DepthSchedule, *, slots: int, capacity: int) -> None:
        super().__init__(program, slots=slots, capacity=capacity)
        self._stack = layers_of(program)
        self._programs: dict[int, Program] = {}
        self._names = [str(node.target) for node in self.layout.caches(program)]
        self.depths = Depths(schedule, len(self._stack.layers), slots)

    def _step(
        self, tokens: torch.Tensor, slots: torch.Tensor, starts: torch.Tensor, rows: torch.Tensor
    ) -> torch.Tensor:
        logits = torch.empty(*rows.shape, self.layout.vocabulary)
        for depth, at in self.depths.rows(tokens, slots, starts).items():
            if depth not in self._programs:
                self._programs[depth] = truncated(self.program, self._stack, depth)
            program = self._programs[depth]
            places = [self._names.index(name) for name in names_of_caches(program)]
            given = (tokens[at], slots[at], starts[at], rows[at], *(self._caches[place] for place in places))
            with torch.no_grad():
                found, *caches = program.body(*given, *self._weights(slots[at]))
            for place, cache in zip(places, caches, strict=True):
                self._caches[place] = cache
            logits[at] = found.float()
        return logits

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` positions of one slot to another."""
        super().copy(source, target, length)
        self.depths.copied(source, target, length)
