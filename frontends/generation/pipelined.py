"""Pipelined speculative decoding (SPEED, Hooper et al. 2023): each stage starts a token on what the last one guesses.

A decoder that repeats its layers can be asked for a prediction after every repetition. So a token is started as soon as
its predecessor has been through the group once; all tokens in flight, each at another repetition, go through the group
together, which reads each weight once for all of them. When a prediction changes, the tokens that were started from the
old one are dropped, and the next is started from the new one. What they had written into the caches lies behind the
positions that later rows begin at, and is overwritten. A token is taken over when it has been through all repetitions,
so the answer is that of ordinary decoding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Several
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch

from graphwright.backends.pipeline import PipelineSession
from graphwright.frontends.generation.prompt_cache import PromptCache
from graphwright.frontends.generation.result import Generation, Pipelining
from graphwright.frontends.generation.run import Run
from graphwright.frontends.generation.sampling import Sampling, pick, uniform
from graphwright.frontends.generation.sequence import Sequence
from graphwright.ir.errors import InputError


@dataclass
class _Flight:
    """A token on its way.

    Attributes:
        token: itself.
        position: where it stands.
        row: of the last stage, which gave its hidden state; of no account before its first.
        guesses: what follows it, after each repetition that it has been through; ``None`` where logits were no numbers.
        is_taken: what follows it has become part of the answer, early.
    """

    token: int
    position: int
    row: int = 0
    guesses: list[int | None] = field(default_factory=list)
    is_taken: bool = False

    @property
    def depth(self) -> int:
        """Repetitions that it has been through."""
        return len(self.guesses)


@dataclass
class _Lane:
    """One sequence and its tokens in flight, the oldest first."""

    sequence: Sequence
    flights: list[_Flight] = field(default_factory=list)
    uniforms: list[float] = field(default_factory=list)

    def next_token(self) -> int | None:
        """What can be started now."""
        sequence, flights = self.sequence, self.flights
        if not flights:
            return sequence.tokens[-1]
        guess, following = flights[-1].guesses[-1] if flights[-1].guesses else None, flights[-1].position + 2
        # A token is worth starting only where what follows it has a place in the answer.
        has_place = following < min(len(sequence.prompt) + sequence.most, sequence.room)
        return guess if has_place and guess not in sequence.stop_tokens else None

    def number(self, position: int) -> float:
        """The random number of the token at a position: the one that ordinary sampling would draw for it."""
        # The first token of the answer has been drawn when the prompt was taken in.
        while len(self.uniforms) <= position - len(self.sequence.prompt) - 1:
            self.uniforms.append(uniform(self.sequence.generator))
        return self.uniforms[position - len(self.sequence.prompt) - 1]


class PipelinedRun(Run):
    """A run whose steps are stages.

    Args:
        cache: of a pipeline's session.
        sequences, sampling, seed: as for :class:`Run`.
        exit_confidence: how likely the likeliest token must be for a prediction to be final before the last repetition;
            ``None`` for never. Answers are then others than those of ordinary decoding.

    Raises:
        InputError: the cache is no pipeline's.
    """

    def __init__(
        self,
        cache: PromptCache,
        sequences: Several[Sequence],
        sampling: Sampling,
        *,
        seed: int = 0,
        exit_confidence: float | None = None,
    ) -> None:
        super().__init__(cache, sequences, sampling, seed=seed)
        if not isinstance(cache.session, PipelineSession):
            raise InputError(
                "has no caches for repetitions",
                where="argument 'cache'",
                hint="make it with prompt_cache(pipeline=True)",
            )
        self._pipeline, self._exit = cache.session, exit_confidence
        self._lanes: dict[int, _Lane] = {}
        repeats = cache.session.repeats
        self._flips, self._completed = [0] * (repeats - 1), 0
        self._first_flips = self._rows = self._lane_stages = self._dropped = self._exits = self._early_flips = 0
        self._hidden = np.zeros((1, cache.session.width), np.float32)

    def result(self) -> Generation:
        """What there is so far."""
        made = Pipelining(
            repeats=self._pipeline.repeats,
            stages=self._steps,
            lane_stages=self._lane_stages,
            rows=self._rows,
            dropped=self._dropped,
            completed=self._completed,
            flips=tuple(self._flips),
            first_flips=self._first_flips,
            exit_confidence=self._exit,
            early_exits=self._exits,
            early_flips=self._early_flips,
        )
        return replace(super().result(), pipeline=made)

    def _step(self) -> None:
        lanes = [self._lanes.setdefault(each.row, _Lane(each)) for each in self._running]
        for lane in lanes:
            self._start(lane)
        logits = self._run_stage(lanes)
        best = logits.argmax(axis=1).tolist()
        self._steps += 1
        self._lane_stages += len(lanes)
        self._rows += len(logits)
        at = 0
        for lane in lanes:
            count = len(lane.flights)
            self._advance_lane(lane, at, logits[at : at + count], best[at : at + count])
            at += count
        for lane in lanes:
            if lane.sequence.stopped:
                self._leave(lane.sequence)
        self._running = [each for each in self._running if not each.stopped]

    def _leave(self, sequence: Sequence) -> None:
        self._lanes.pop(sequence.row, None)
        super()._leave(sequence)

    def _start(self, lane: _Lane) -> None:
        flights = lane.flights
        if flights and not flights[-1].guesses:  # a cancelled stage has begun already
            return
        token = lane.next_token()
        if token is not None:
            position = flights[-1].position + 1 if flights else len(lane.sequence.tokens) - 1
            flights.append(_Flight(token, position))

    def _run_stage(self, lanes: Several[_Lane]) -> npt.NDArray[np.float32]:
        flying = [(lane.sequence.slot, flight) for lane in lanes for flight in lane.flights]
        logits, self._hidden = self._pipeline.stage_tokens(
            [flight.token for _, flight in flying],
            self._hidden[[flight.row for _, flight in flying]],
            [flight.depth for _, flight in flying],
            [slot for slot, _ in flying],
            [flight.position for _, flight in flying],
        )
        return logits

    def _advance_lane(self, lane: _Lane, at: int, logits: npt.NDArray[np.float32], best: Several[int]) -> None:
        """Take over what the stage gave for one sequence, from row ``at`` on."""
        flights, repeats = lane.flights, self._pipeline.repeats
        for index, flight in enumerate(flights):
            flight.row = at + index
            before = flight.guesses[-1] if flight.guesses else None
            guess = self._guess(lane, index, logits[index], best[index])
            if flight.is_taken:  # what follows it stays, whatever deeper repetitions say
                self._early_flips += guess != before
                guess = before
            flight.guesses.append(guess)
            if flight.depth > 1 and guess != before:
                self._dropped += len(flights) - index - 1
                del flights[index + 1 :]
                break
        self._take_over(lane, logits, repeats)

    def _guess(self, lane: _Lane, index: int, logits: npt.NDArray[np.float32], best: int) -> int | None:
        if not math.isfinite(logits[best]):  # argmax finds NaN where there is one
            return None
        sampling, sequence = self._sampling, lane.sequence
        if sampling.is_plain:
            return best
        seen = sequence.seen
        if seen is not None:
            seen = seen.clone()
            seen[[flight.token for flight in lane.flights[: index + 1]]] = True
        row = torch.from_numpy(logits)
        if sampling.is_greedy:
            return sampling.best(row, seen)
        return pick(sampling.probabilities(row, seen), lane.number(lane.flights[index].position + 1))

    def _take_over(self, lane: _Lane, logits: npt.NDArray[np.float32], repeats: int) -> None:
        """Let the answer grow by what is certain now."""
        sequence, flights = lane.sequence, lane.flights
        for index, flight in enumerate(flights):
            is_through = flight.depth == repeats
            if is_through and flight.guesses[-1] is None:
                self._check(sequence, torch.from_numpy(logits[index : index + 1]))
            if not is_through and not self._is_sure(flight, logits[index]):
                break
            if not flight.is_taken:
                guess = flight.guesses[-1]
                assert guess is not None
                flight.is_taken = True
                self._exits += not is_through
                sequence.add(guess)
            if is_through:
                self._complete(sequence.slot, flight)
            if sequence.stopped:
                return
        if flights and flights[0].depth == repeats:
            del flights[0]

    def _is_sure(self, flight: _Flight, logits: npt.NDArray[np.float32]) -> bool:
        if flight.is_taken:
            return True
        if self._exit is None or flight.guesses[-1] is None:
            return False
        # The probability of the likeliest token, whatever the sampling.
        return bool(1 / np.exp((logits - logits.max()).astype(np.float64)).sum() >= self._exit)

    def _complete(self, slot: int, flight: _Flight) -> None:
        """A token has been through all repetitions: its cache entries stand."""
        self._cache.held[slot].append(flight.token)
        self._completed += 1
        guesses = flight.guesses
        for index in range(1, len(guesses)):
            self._flips[index - 1] += guesses[index] != guesses[index - 1]
        self._first_flips += guesses[-1] != guesses[0]
