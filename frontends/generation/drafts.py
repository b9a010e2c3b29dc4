"""Drafts: guesses of the next tokens, which one step of the model then checks together.

Speculative decoding (Leviathan et al. 2023, Chen et al. 2023) takes over only what the model itself could have given:
the likeliest tokens in greedy decoding, and exactly the model's distribution in sampling. Whatever guesses stands
behind :class:`Draft`: a smaller decoder, the prompt itself, earlier layers of the same model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from graphwright.frontends.generation.sampling import Sampling
from graphwright.ir.errors import InputError


@dataclass(frozen=True)
class Wanted:
    """One running sequence, to be continued.

    Attributes:
        row: its number; the same sequence has the same number until it is forgotten.
        tokens: prompt and answer so far. Not to be changed.
        count: how many tokens at most.
        sampling: how the model chooses; a draft that chooses alike is accepted most often.
        generator: the sequence's own random numbers.
        adapters: that answer it, by name with their weights; a draft that has the same is accepted most often.
    """

    row: int
    tokens: Sequence[int]
    count: int
    sampling: Sampling
    generator: torch.Generator
    adapters: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Proposal:
    """Guessed tokens; none is a proposal too.

    Attributes:
        tokens: at most as many as were wanted.
        probabilities: float64 ``[len(tokens), V]``: the distribution that each was drawn from, given those before it.
            ``None`` where they are certain guesses, not drawn. Anything else than what they were really drawn from
            makes sampled answers come from a wrong distribution.
    """

    tokens: Sequence[int] = ()
    probabilities: torch.Tensor | None = None


class Proposer(ABC):
    """A draft at work on the sequences of one call."""

    @abstractmethod
    def propose(self, wanted: Sequence[Wanted]) -> Sequence[Proposal]:
        """Guess on; one proposal for each sequence, in order."""

    def forget(self, row: int) -> None:  # noqa: B027 - most proposers have nothing to forget
        """The sequence is finished; its number will not come again."""


class Draft(ABC):
    """What guesses.

    Attributes:
        tokens: how many at a time, at most.
    """

    tokens: int

    @abstractmethod
    def start(self, *, rows: int, capacity: int, vocabulary: int) -> Proposer:
        """Get ready for a call.

        Args:
            rows: sequences that run at a time, at most.
            capacity: tokens that a sequence may grow to.
            vocabulary: of the model that checks the guesses.

        Raises:
            InputError: the draft's vocabulary is another.
        """


@dataclass(frozen=True)
class PromptLookup(Draft):
    """Guess that what followed the last few tokens earlier in the sequence follows again (Saxena 2023).

    Costs nothing, and helps where answers repeat their prompt: summaries, edits, code.

    Attributes:
        tokens: guessed at a time.
        longest: of the last tokens looked for; shorter ends are tried when it is not found.
        shortest: of them.

    Raises:
        InputError: a number is below 1, or the longest is shorter than the shortest.
    """

    tokens: int = 8
    longest: int = 3
    shortest: int = 1

    def __post_init__(self) -> None:
        if self.tokens < 1 or not 1 <= self.shortest <= self.longest:
            raise InputError(
                f"cannot look up from {self.shortest} to {self.longest} tokens and guess {self.tokens}",
                where="PromptLookup",
                hint="all are 1 or more, and longest is not below shortest",
            )

    def start(self, *, rows: int, capacity: int, vocabulary: int) -> Proposer:
        """Nothing to do."""
        return _Lookup(self)


@dataclass
class _Index:
    """Where each run of tokens was last followed by something: run -> position behind it."""

    done: int = 0
    places: dict[tuple[int, ...], int] = field(default_factory=dict)


class _Lookup(Proposer):
    def __init__(self, options: PromptLookup) -> None:
        self._options = options
        self._indices: dict[int, _Index] = {}

    def propose(self, wanted: Sequence[Wanted]) -> list[Proposal]:
        return [self._propose(each) for each in wanted]

    def forget(self, row: int) -> None:
        self._indices.pop(row, None)

    def _propose(self, wanted: Wanted) -> Proposal:
        index, tokens = self._indices.setdefault(wanted.row, _Index()), wanted.tokens
        sizes = range(self._options.longest, self._options.shortest - 1, -1)
        for end in range(index.done + 1, len(tokens)):
            for size in sizes:
                if size <= end:
                    index.places[tuple(tokens[end - size : end])] = end
        index.done = max(index.done, len(tokens) - 1)
        for size in sizes:
            if size <= len(tokens):
                at = index.places.get(tuple(tokens[len(tokens) - size :]))
                if at is not None:
                    return Proposal(tuple(tokens[at : at + wanted.count]))
        return Proposal()
