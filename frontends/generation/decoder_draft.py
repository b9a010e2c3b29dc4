"""A smaller decoder as a draft."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from graphwright.frontends.generation.adapters import choice_alike
from graphwright.frontends.generation.drafts import Draft, Proposal, Proposer, Wanted
from graphwright.frontends.generation.prompt_cache import Feed, PromptCache, common_prefix
from graphwright.frontends.generation.sampling import draw, what_is_wrong
from graphwright.ir.errors import GenerationError, InputError

if TYPE_CHECKING:
    from graphwright.frontends.generation.decoder import Decoder

_CHUNK = 512  # tokens of a prompt at a time


@dataclass(frozen=True)
class DecoderDraft(Draft):
    """Guess with another decoder of the same vocabulary, which chooses as the model is told to.

    Where calls switch its adapters, those answer that have the names of the model's.

    Attributes:
        decoder: the smaller one.
        tokens: guessed at a time.
        cache: how its keys and values are stored.

    Raises:
        InputError: no tokens are to be guessed.
    """

    decoder: Decoder
    tokens: int = 4
    cache: str = "float32"

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise InputError(f"must be 1 or more, not {self.tokens}", where="argument 'draft_tokens'")

    def start(self, *, rows: int, capacity: int, vocabulary: int) -> Proposer:
        """Caches for as many sequences as run together."""
        own = self.decoder.layout.vocabulary
        if own != vocabulary:
            raise InputError(
                f"the draft has a vocabulary of {own}, the model one of {vocabulary}",
                where="argument 'draft'",
                hint="a draft must give the model's own tokens: take a smaller model of the same family",
            )
        session = self.decoder.session(slots=rows, capacity=capacity + self.tokens, cache=self.cache)
        return _DecoderProposer(self.decoder, PromptCache(session))


@dataclass
class _Growing:
    """One sequence while tokens are guessed for it."""

    wanted: Wanted
    slot: int
    seen: torch.Tensor | None
    tokens: list[int]
    probabilities: list[torch.Tensor]


class _DecoderProposer(Proposer):
    def __init__(self, decoder: Decoder, cache: PromptCache) -> None:
        self._decoder, self._cache = decoder, cache
        self._context = decoder.context or cache.session.capacity
        self._slots: dict[int, int] = {}

    def propose(self, wanted: Sequence[Wanted]) -> list[Proposal]:
        growing = [self._begin(each) for each in wanted if len(each.tokens) + each.count <= self._context]
        pending = [each for each in growing if each.wanted.count]
        while pending:
            rows = self._cache.feed([self._feed(each) for each in pending])
            for each, logits in zip(pending, rows, strict=True):
                self._guess(each, logits[-1])
            pending = [each for each in pending if len(each.tokens) < each.wanted.count]
        made = {each.wanted.row: each for each in growing}
        return [_proposal(made.get(each.row)) for each in wanted]

    def forget(self, row: int) -> None:
        slot = self._slots.pop(row, None)
        if slot is not None:
            self._cache.release(slot)

    def _begin(self, wanted: Wanted) -> _Growing:
        """Bring the slot up to a few tokens before the end of the sequence; guesses not taken over go."""
        tokens = wanted.tokens
        if wanted.row not in self._slots:
            choice = choice_alike(self._decoder, wanted.adapters)
            self._slots[wanted.row], _ = self._cache.acquire(tokens, choice.weights)
        slot = self._slots[wanted.row]
        held = min(common_prefix(self._cache.held[slot], tokens), len(tokens) - 1)
        # Two tokens are left after a step all of whose guesses were taken; more only for a prompt.
        while len(tokens) - held > 2:
            chunk = tokens[held : min(held + _CHUNK, len(tokens) - 1)]
            self._cache.feed([Feed(slot, held, chunk)])
            held += len(chunk)
        self._cache.keep(slot, held)
        seen = wanted.sampling.seen(tokens, self._cache.session.layout.vocabulary)
        return _Growing(wanted, slot, seen, [], [])

    def _feed(self, growing: _Growing) -> Feed:
        held = len(self._cache.held[growing.slot])
        known = growing.wanted.tokens[held:]
        return Feed(growing.slot, held, known if known else growing.tokens[-1:], wanted=1)

    def _guess(self, growing: _Growing, logits: torch.Tensor) -> None:
        sampling = growing.wanted.sampling
        if what_is_wrong(logits.unsqueeze(0)):
            raise GenerationError(
                "the draft's logits are not finite", where="argument 'draft'", hint="check its weights"
            )
        probabilities = sampling.probabilities(logits, growing.seen)
        token = draw(probabilities, growing.wanted.generator)
        if not sampling.is_greedy:
            growing.probabilities.append(probabilities)
        growing.tokens.append(token)
        if growing.seen is not None:
            growing.seen[token] = True


def _proposal(growing: _Growing | None) -> Proposal:
    if growing is None or not growing.tokens:
        return Proposal()
    return Proposal(tuple(growing.tokens), torch.stack(growing.probabilities) if growing.probabilities else None)
