"""Decoding by stages in plain PyTorch."""

from __future__ import annotations

import torch

from graphwright.backends.pipeline import PipelineSession
from graphwright.ir.stages import Stage
from graphwright.ir.types import TensorType


class ReferencePipeline(PipelineSession):
    """A stage's program run as it is; its caches have the model's dtype and are copied at each stage.

    Args:
        stage: of a decoder.
        slots: sequences held at a time.
        capacity: tokens that each can hold.

    Raises:
        InputError: there are no slots or no capacity.
    """

    cache = "float32"

    def __init__(self, stage: Stage, *, slots: int, capacity: int) -> None:
        super().__init__(stage.layout, repeats=stage.repeats, width=stage.width, slots=slots, capacity=capacity)
        self.program = stage.program
        kinds = [kind for kind in map(self.program.type_of, self.program.inputs) if isinstance(kind, TensorType)]
        self._dtype = kinds[1].dtype
        self._caches = [
            torch.zeros(slots * stage.repeats, int(kind.shape[1]), capacity, int(kind.shape[3]), dtype=kind.dtype)
            for kind in kinds[6:]
        ]

    def _stage(
        self,
        tokens: torch.Tensor,
        hidden: torch.Tensor,
        is_new: torch.Tensor,
        slots: torch.Tensor,
        starts: torch.Tensor,
        rows: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        given = (tokens, hidden.to(self._dtype), is_new, slots, starts, rows)
        with torch.no_grad():
            logits, after, *caches = self.program.body(*given, *self._caches)
        self._caches = caches
        return logits.float(), after.float()

    def _copy(self, source: int, target: int, length: int) -> None:
        for cache in self._caches:
            cache[target, :, :length] = cache[source, :, :length]
