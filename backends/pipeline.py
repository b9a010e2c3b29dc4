"""A decoder that runs stage by stage: rows of one stage stand at different repetitions of its group of layers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from graphwright.backends.session import Session
from graphwright.ir.decoder import DecoderLayout
from graphwright.ir.errors import InputError


class PipelineSession(Session):
    """A session of a decoder that repeats a group of layers (see :class:`graphwright.ir.stages.Stage`).

    Each slot has caches for every repetition. :meth:`step` runs the whole depth, one repetition after another, so
    everything that stands on sessions works with it; :meth:`stage` runs the group once on rows that stand at different
    repetitions, and reads each weight once for all of them.

    Attributes:
        repeats: how often the decoder runs the group.
        width: of the hidden state.
    """

    repeats: int
    width: int

    def __init__(self, layout: DecoderLayout, *, repeats: int, width: int, slots: int, capacity: int) -> None:
        if slots < 1 or capacity < 1:
            raise InputError(f"needs slots and capacity, not {slots} and {capacity}", where="session")
        self.layout, self.repeats, self.width, self.slots, self.capacity = layout, repeats, width, slots, capacity

    def stage(
        self,
        tokens: torch.Tensor,
        hidden: torch.Tensor,
        repetitions: torch.Tensor,
        slots: torch.Tensor,
        starts: torch.Tensor,
        rows: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the group of layers once.

        Row ``b`` takes the tokens at positions ``starts[b]...`` of slot ``slots[b]`` through repetition
        ``repetitions[b]``. Its earlier positions must have been through that repetition, and its own ones through those
        before it. What stands at later positions is taken back by that.

        Args:
            tokens: int64 ``[B, S]``.
            hidden: ``[B, S, D]`` float32: what the stage gave for the row at the repetition before; of no account at
                repetition 0.
            repetitions: int64 ``[B]``, from 0.
            slots: int64 ``[B]``; a slot and a repetition may come together once.
            starts: int64 ``[B]``.
            rows: int64 ``[B, K]``: which tokens are classified; K may be 0.

        Returns:
            logits float32 ``[B, K, V]`` of the shared classifier, overwritten by the next stage, and the hidden state
            float32 ``[B, S, D]``.

        Raises:
            InputError: a value is out of its range; nothing has been written then.
        """
        at, which = slots.tolist(), repetitions.tolist()
        if not all(0 <= slot < self.slots for slot in at):
            raise InputError(f"slots {at} are not all among {self.slots}", where="pipeline stage")
        if not all(0 <= each < self.repeats for each in which):
            raise InputError(f"repetitions {which} are not all among {self.repeats}", where="pipeline stage")
        if hidden.shape != (*tokens.shape, self.width):
            raise InputError(
                f"hidden is {list(hidden.shape)}, tokens {list(tokens.shape)} of width {self.width}",
                where="pipeline stage",
            )
        inner = slots * self.repeats + repetitions
        self._check(tokens, inner, starts, rows, self.slots * self.repeats)
        return self._stage(tokens, hidden, repetitions == 0, inner, starts, rows)

    def stage_tokens(
        self,
        tokens: Sequence[int],
        hidden: npt.NDArray[np.float32],
        repetitions: Sequence[int],
        slots: Sequence[int],
        starts: Sequence[int],
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """:meth:`stage` for one token in each row, all of them classified: what decoding takes again and again.

        Args:
            tokens, repetitions, slots, starts: a number for each row.
            hidden: float32 ``[B, D]``.

        Returns:
            logits float32 ``[B, V]``, overwritten by the next stage, and the hidden state float32 ``[B, D]``.

        Raises:
            InputError: as for :meth:`stage`.
        """
        count = len(tokens)
        ids, which, at, begin = (torch.tensor(each, dtype=torch.int64) for each in (tokens, repetitions, slots, starts))
        rows = torch.zeros(count, 1, dtype=torch.int64)
        logits, after = self.stage(ids.unsqueeze(1), torch.from_numpy(hidden).unsqueeze(1), which, at, begin, rows)
        return logits.view(count, -1).numpy(), after.view(count, -1).numpy()

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` positions of one slot to another, at every repetition."""
        for repetition in range(self.repeats):
            self._copy(source * self.repeats + repetition, target * self.repeats + repetition, length)

    def _step(
        self, tokens: torch.Tensor, slots: torch.Tensor, starts: torch.Tensor, rows: torch.Tensor
    ) -> torch.Tensor:
        hidden = torch.zeros(*tokens.shape, self.width)
        is_new = torch.ones(len(tokens), dtype=torch.bool)
        logits = torch.empty(0)
        for repetition in range(self.repeats):
            wanted = rows if repetition == self.repeats - 1 else rows[:, :0]
            inner = slots * self.repeats + repetition
            logits, hidden = self._stage(tokens, hidden, is_new, inner, starts, wanted)
            is_new = torch.zeros_like(is_new)
        return logits

    @abstractmethod
    def _stage(
        self,
        tokens: torch.Tensor,
        hidden: torch.Tensor,
        is_new: torch.Tensor,
        slots: torch.Tensor,
        starts: torch.Tensor,
        rows: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The stage, of inputs that fit; ``slots`` are those of one repetition."""

    @abstractmethod
    def _copy(self, source: int, target: int, length: int) -> None:
        """Copy positions of one repetition's slot to another."""
