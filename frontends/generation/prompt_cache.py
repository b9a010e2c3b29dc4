"""A session that remembers which tokens its slots hold, so that what prompts share is computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from graphwright.backends.session import Session
from graphwright.ir.errors import InputError


@dataclass(frozen=True)
class Feed:
    """Tokens for one slot.

    Attributes:
        slot: where.
        start: how many tokens of the slot stay; what stands behind is taken back.
        tokens: to take in, at least one.
        wanted: of how many of the last tokens logits are wanted.
    """

    slot: int
    start: int
    tokens: Sequence[int]
    wanted: int = 0


class PromptCache:
    """The slots of a session and the tokens that each holds.

    A prompt that begins like what a slot holds takes over that beginning; only the rest is computed. Where the slot
    goes on otherwise, the beginning is copied into another free slot, if there is one, so that both stay. What other
    adapters made of the same tokens is something else: only slots with the same choice of adapters share.

    Attributes:
        session: computes the steps.
        owner: the decoder that it was made for.
        held: the tokens of every slot.
        chosen: the weights of adapters that every slot's tokens were taken in with; none where none is switched.
    """

    def __init__(self, session: Session, owner: object = None) -> None:
        self.session, self.owner = session, owner
        self.held: list[list[int]] = [[] for _ in range(session.slots)]
        self.chosen: list[tuple[float, ...]] = [() for _ in range(session.slots)]
        self._busy: set[int] = set()
        self._used = [0] * session.slots
        self._clock = 0

    @property
    def free(self) -> int:
        """How many slots no running sequence occupies."""
        return self.session.slots - len(self._busy)

    def acquire(self, tokens: Sequence[int], adapters: tuple[float, ...] = ()) -> tuple[int, int]:
        """A free slot, and how many of these tokens it holds already: all but the last at most.

        Args:
            tokens: of a prompt.
            adapters: the weights of those that answer it, where the decoder's are switched.

        Raises:
            InputError: every slot is occupied, or these are not weights of the decoder's adapters.
        """
        free = [slot for slot in range(self.session.slots) if slot not in self._busy]
        if not free:
            raise InputError(
                f"all {self.session.slots} slots of the cache are occupied",
                where="prompt cache",
                hint="close the streams that use it, or make it with more slots",
            )
        most = len(tokens) - 1
        shared = [
            min(common_prefix(held, tokens), most) if chosen == adapters else 0
            for held, chosen in zip(self.held, self.chosen, strict=True)
        ]
        # The longest beginning; of equals, that which would be lost least: a free slot that holds no more than it.
        best = max(range(self.session.slots), key=lambda slot: (shared[slot], slot in free, -len(self.held[slot])))
        length = shared[best]
        is_continued = best in free and len(self.held[best]) <= length + 1
        slot = best
        if not is_continued:
            others = [each for each in free if each != best]
            # What was not used for longest goes first; empty slots before it.
            slot = min(others, key=lambda each: (bool(self.held[each]), self._used[each])) if others else best
        if self.session.layout.adapters:
            self.session.choose(slot, adapters)
        if slot != best and length:
            self.session.copy(best, slot, length)
        self.held[slot], self.chosen[slot] = list(tokens[:length]), adapters
        self._busy.add(slot)
        self._touch(slot)
        return slot, length

    def release(self, slot: int) -> None:
        """Let others have a slot; what it holds stays until then."""
        self._busy.discard(slot)
        self._touch(slot)

    def feed(self, feeds: Sequence[Feed]) -> list[torch.Tensor]:
        """One step.

        Returns:
            for each feed float32 ``[wanted, V]``; overwritten by the next step.

        Raises:
            InputError: the tokens do not fit; nothing has been computed then.
        """
        longest = max(len(feed.tokens) for feed in feeds)
        most = max(feed.wanted for feed in feeds)
        tokens = torch.tensor([[*feed.tokens, *[feed.tokens[-1]] * (longest - len(feed.tokens))] for feed in feeds])
        rows = torch.zeros(len(feeds), most, dtype=torch.int64)
        for index, feed in enumerate(feeds):
            first = len(feed.tokens) - feed.wanted
            rows[index] = (first + torch.arange(most)).clamp(max=len(feed.tokens) - 1)
        slots = torch.tensor([feed.slot for feed in feeds])
        starts = torch.tensor([feed.start for feed in feeds])
        # Taken back before the step: were it interrupted, what it has overwritten must not count as held.
        for feed in feeds:
            del self.held[feed.slot][feed.start :]
        logits = self.session.step(tokens, slots, starts, rows)
        for feed in feeds:
            self.held[feed.slot].extend(feed.tokens)
        return [logits[index, : feed.wanted] for index, feed in enumerate(feeds)]

    def keep(self, slot: int, length: int) -> None:
        """Take back what a slot holds beyond ``length`` tokens."""
        del self.held[slot][length:]

    def clear(self) -> None:
        """Forget what free slots hold."""
        for slot in range(self.session.slots):
            if slot not in self._busy:
                self.held[slot] = []

    def _touch(self, slot: int) -> None:
        self._clock += 1
        self._used[slot] = self._clock


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two sequences share at their beginning."""
    low, high = 0, min(len(first), len(second))
    # Bisection over slices: they are compared in C.
    while low < high:
        middle = (low + high + 1) // 2
        if list(first[low:middle]) == list(second[low:middle]):
            low = middle
        else:
            high = middle - 1
    return low
