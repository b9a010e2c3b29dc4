"""A pipeline whose logits are a function of the tokens before and of the repetition, and which watches its caches."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import torch

from graphwright.backends.pipeline import PipelineSession
from graphwright.frontends.generation.decoder import Decoder
from graphwright.frontends.generation.facts import DecoderFacts
from graphwright.ir.decoder import DecoderLayout


class ScriptedPipeline(PipelineSession):
    """Logits are random numbers of the whole text before, so one stale entry of a cache changes all that follows.

    At a repetition that is not the last they are those of the last one, or with probability ``flips`` others.
    """

    cache = "float32"

    def __init__(self, vocabulary: int, repeats: int, flips: float, slots: int, capacity: int) -> None:
        layout = DecoderLayout(((1, 1),) * repeats, ((1, 1),) * repeats, vocabulary)
        super().__init__(layout, repeats=repeats, width=1, slots=slots, capacity=capacity)
        self.flips = flips
        self.held = torch.full((slots * repeats, capacity), -1)

    def _stage(
        self,
        tokens: torch.Tensor,
        hidden: torch.Tensor,
        is_new: torch.Tensor,
        slots: torch.Tensor,
        starts: torch.Tensor,
        rows: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits = torch.empty(*rows.shape, self.layout.vocabulary)
        after = tokens.unsqueeze(2).float()
        for row, (slot, start) in enumerate(zip(slots.tolist(), starts.tolist(), strict=True)):
            depth = slot % self.repeats
            assert bool(is_new[row]) == (depth == 0)
            own = slice(start, start + tokens.shape[1])
            if depth:  # what comes is what the repetition before gave for these very tokens
                assert torch.equal(hidden[row], after[row])
                assert torch.equal(self.held[slot - 1, own], tokens[row]), "a token has skipped a repetition"
            self.held[slot, own] = tokens[row]
            assert int(self.held[slot, : own.stop].min()) >= 0, "a position that was never written is read"
            for column, place in enumerate(rows[row].tolist()):
                text = self.held[slot, : start + place + 1].tolist()
                logits[row, column] = self.logits(text, depth)
        return logits, after

    def logits(self, text: list[int], depth: int) -> torch.Tensor:
        """Of what follows a text, after a repetition."""
        seed = zlib.crc32(repr(text).encode())
        last = np.random.default_rng(seed).standard_normal(self.layout.vocabulary) * 3
        if depth == self.repeats - 1:
            return torch.from_numpy(last).float()
        random = np.random.default_rng([seed, depth])
        if random.random() >= self.flips:
            return torch.from_numpy(last).float()
        return torch.from_numpy(np.roll(last, int(random.integers(1, self.layout.vocabulary)))).float()

    def _copy(self, source: int, target: int, length: int) -> None:
        self.held[target, :length] = self.held[source, :length]


class ScriptedDecoder(Decoder):
    """Answers by a :class:`ScriptedPipeline`, stage by stage or in whole steps."""

    def __init__(self, vocabulary: int, repeats: int, flips: float, facts: DecoderFacts | None = None) -> None:
        self.options = (vocabulary, repeats, flips)
        self.layout = DecoderLayout(((1, 1),) * repeats, ((1, 1),) * repeats, vocabulary)
        self.facts = facts or DecoderFacts()

    def _lowered(self) -> Any:
        return self

    def session(
        self, *, slots: int = 1, capacity: int | None = None, cache: str = "float32", depth: Any = None
    ) -> ScriptedPipeline:
        return ScriptedPipeline(*self.options, slots, capacity or 64)

    def pipeline_session(
        self, *, slots: int = 1, capacity: int | None = None, cache: str = "float32"
    ) -> ScriptedPipeline:
        return self.session(slots=slots, capacity=capacity, cache=cache)
