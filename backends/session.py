"""A decoder that runs: its caches, and one step at a time. Every backend offers it; generation stands on it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch

from graphwright.ir.decoder import DecoderLayout
from graphwright.ir.errors import InputError


class StepCancelled(Exception):
    """A step ended early, as :meth:`Session.cancel` asked; nothing that it was given counts as taken in."""


# How caches may be stored.
CACHES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}


class Session(ABC):
    """Caches of some slots, and steps on them. Which tokens a slot holds, and how many, the caller knows.

    Not for several threads at once; several sessions may run at once.

    Attributes:
        layout: of the decoder.
        slots: sequences that can be held at a time.
        capacity: tokens that each can hold.
        cache: how keys and values are stored: ``"float32"``, ``"bfloat16"`` or ``"int8"`` (one scale for each head and
            position).
    """

    layout: DecoderLayout
    slots: int
    capacity: int
    cache: str
    _chosen: Mapping[int, tuple[float, ...]] = MappingProxyType({})

    def choose(self, slot: int, weights: Sequence[float]) -> None:
        """Say which adapters answer in a slot, until it is said again.

        What a slot holds was computed with the choice before: begin it again at position 0.

        Args:
            slot: where.
            weights: of every adapter that is switched, in order; 0 leaves it out.

        Raises:
            InputError: there is no such slot, or these are not as many finite numbers as adapters.
        """
        given = tuple(float(weight) for weight in weights)
        if not 0 <= slot < self.slots:
            raise InputError(f"slot {slot} is not one of {self.slots}", where="choice of adapters")
        if len(given) != self.layout.adapters or not all(map(math.isfinite, given)):
            raise InputError(
                f"{list(given)} is no weight for each of {self.layout.adapters} switched adapters",
                where=f"choice of adapters for slot {slot}",
                hint="adapter_weights makes them of names",
            )
        self._chosen = {**self._chosen, slot: given}

    def step(self, tokens: torch.Tensor, slots: torch.Tensor, starts: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Take tokens in and give logits.

        Token ``tokens[b, s]`` is written at position ``starts[b] + s`` of slot ``slots[b]`` and sees what stands there
        before it. To take tokens back, give a smaller start the next time. Where rows bring different numbers of
        tokens, fill up with any token behind the last: what is written for those is overwritten by the next step.

        Args:
            tokens: int64 ``[B, S]``.
            slots: int64 ``[B]``, distinct.
            starts: int64 ``[B]``.
            rows: int64 ``[B, K]``: which tokens' logits are wanted; K may be 0.

        Returns:
            float32 ``[B, K, V]``; overwritten by the next step of this session.

        Raises:
            InputError: a token is not in the vocabulary, a slot or row does not exist, a position is beyond the
                capacity, or adapters are switched and nothing was chosen for a slot. Nothing has been written then.
        """
        self._check(tokens, slots, starts, rows)
        return self._step(tokens, slots, starts, rows)

    def cancel(self) -> None:
        """Make a step that another thread is in end soon, by raising :class:`StepCancelled`, where the backend can."""
        return

    @abstractmethod
    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` positions of one slot to another."""

    @abstractmethod
    def _step(
        self, tokens: torch.Tensor, slots: torch.Tensor, starts: torch.Tensor, rows: torch.Tensor
    ) -> torch.Tensor:
        """The step, of inputs that fit."""

    def _weights(self, slots: torch.Tensor) -> list[torch.Tensor]:
        """What was chosen for the slots of a step, float32 ``[B, adapters]``, where adapters are switched."""
        return [torch.tensor([self._chosen[slot] for slot in slots.tolist()])] if self.layout.adapters else []

    def _check(
        self,
        tokens: torch.Tensor,
        slots: torch.Tensor,
        starts: torch.Tensor,
        rows: torch.Tensor,
        count: int | None = None,
    ) -> None:
        count = self.slots if count is None else count
        batch, length = tokens.shape
        if slots.shape != (batch,) or starts.shape != (batch,) or rows.dim() != 2 or len(rows) != batch:
            raise InputError(
                f"shapes do not fit: tokens {list(tokens.shape)}, slots {list(slots.shape)},"
                f" starts {list(starts.shape)}, rows {list(rows.shape)}",
                where="decoding step",
            )
        if batch == 0 or length == 0:
            raise InputError("has no tokens", where="decoding step")
        ids, at, begin = tokens.tolist(), slots.tolist(), starts.tolist()
        for row in ids:
            for token in row:
                if not 0 <= token < self.layout.vocabulary:
                    raise InputError(
                        f"token {token} is not in the vocabulary of {self.layout.vocabulary}", where="decoding step"
                    )
        if len(set(at)) != batch or not all(0 <= slot < count for slot in at):
            raise InputError(f"slots {at} are not distinct ones of {count}", where="decoding step")
        silent = [slot for slot in at if slot not in self._chosen] if self.layout.adapters else []
        if silent:
            raise InputError(
                f"which of {self.layout.adapters} adapters answer in the slots {silent} was not said",
                where="decoding step",
                hint="choose() says it; weights of 0 are the base alone",
            )
        for start in begin:
            if start < 0 or start + length > self.capacity:
                raise InputError(
                    f"{length} tokens from position {start} on do not fit a cache of {self.capacity}",
                    where="decoding step",
                    hint="make a session of more capacity, or shorten the prompt",
                )
            if self.layout.length is not None and start + length > self.layout.length:
                raise InputError(
                    f"{length} tokens from position {start} on do not fit the {self.layout.length} positions it has",
                    where="decoding step",
                    hint="give PrepareDecoder or TabulatePositions a larger length=, or shorten the prompt",
                )
        if any(not 0 <= row < length for each in rows.tolist() for row in each):
            raise InputError(f"rows {rows.tolist()} are not all among {length} tokens", where="decoding step")
