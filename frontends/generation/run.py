"""The loop: prompts come into free slots, running answers grow together, finished ones leave."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence as Several
from types import TracebackType

from torch import Tensor

from graphwright.backends.session import StepCancelled
from graphwright.frontends.generation.drafts import Draft, Proposal, Proposer, Wanted
from graphwright.frontends.generation.prompt_cache import Feed, PromptCache
from graphwright.frontends.generation.result import Counts, Generation
from graphwright.frontends.generation.sampling import Sampling, what_is_wrong
from graphwright.frontends.generation.sequence import Sequence
from graphwright.frontends.generation.verification import verified
from graphwright.ir.errors import GenerationError, InputError

# Tokens of a prompt taken in at a time: bounds the memory of activations, and how long a cancel waits.
CHUNK = 512


class Run:
    """Answers in the making. Leave the block, or call :meth:`close`, to give the slots of the cache back.

    Args:
        cache: as many sequences run at a time as it has free slots; the others wait.
        sequences: with prompts that fit the cache.
        sampling: how tokens are chosen.
        draft: what guesses ahead, if anything.
        seed: for the result.

    Attributes:
        cancelled: set by :meth:`cancel`.
    """

    def __init__(
        self,
        cache: PromptCache,
        sequences: Several[Sequence],
        sampling: Sampling,
        *,
        draft: Draft | None = None,
        seed: int = 0,
    ) -> None:
        self.cancelled = threading.Event()
        self._is_stepping = False
        self.sequences = tuple(sequences)
        self._cache, self._sampling, self._draft, self._seed = cache, sampling, draft, seed
        self._proposer: Proposer | None = None
        if draft is not None:
            session = cache.session
            rows = min(len(sequences), session.slots)
            self._proposer = draft.start(rows=rows, capacity=session.capacity, vocabulary=session.layout.vocabulary)
        self._waiting = deque(sequences)
        self._filling: Sequence | None = None
        self._running: list[Sequence] = []
        self._reused = self._steps = self._drafted = self._accepted = 0
        self._prompt_seconds = self._seconds = 0.0

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def is_done(self) -> bool:
        """Whether every answer has ended."""
        return not (self._waiting or self._filling is not None or self._running)

    def advance(self) -> None:
        """One step of the session: a piece of one prompt, or the next tokens of all that run.

        Raises:
            GenerationError: the model's logits are not finite.
            InputError: a draft proposes what is no token.
        """
        if self.cancelled.is_set():
            self.close()
            return
        self._is_stepping = True
        try:
            self._advance()
        except StepCancelled:
            # What was given has not been taken in, so that a cancel which was meant for a call before this one only
            # makes it begin again.
            if self.cancelled.is_set():
                self.close()
        finally:
            self._is_stepping = False

    def cancel(self) -> None:
        """Stop, in the middle of a step where the backend can; from any thread, without waiting."""
        self.cancelled.set()
        if self._is_stepping:
            self._cache.session.cancel()

    def _advance(self) -> None:
        began = time.perf_counter()
        # One at a time: the next one may share a beginning with it. With nothing running, a full cache is an error.
        if self._waiting and self._filling is None and (self._cache.free or not self._running):
            sequence = self._waiting[0]
            sequence.slot, reused = self._cache.acquire(sequence.prompt, sequence.choice.weights)
            self._reused += reused
            self._filling = self._waiting.popleft()
        if self._filling is not None:
            self._fill(self._filling)
            self._prompt_seconds += time.perf_counter() - began
        elif self._running:
            self._step()
            self._seconds += time.perf_counter() - began

    def close(self) -> None:
        """End what has not ended yet as cancelled, and give the slots back."""
        begun = [*self._running, *([self._filling] if self._filling is not None else [])]
        for sequence in (*self._waiting, *begun):
            if sequence.stopped is None:
                sequence.stop("cancelled")
        for sequence in begun:
            self._leave(sequence)
        self._waiting.clear()
        self._filling = None
        self._running = []

    def result(self) -> Generation:
        """What there is so far."""
        sequences = self.sequences
        counts = Counts(
            prompt_tokens=sum(len(each.prompt) for each in sequences),
            reused_tokens=self._reused,
            new_tokens=sum(len(each.new) for each in sequences),
            first_tokens=sum(len(each.tokens) > len(each.prompt) for each in sequences),
            steps=self._steps,
            drafted_tokens=self._drafted,
            accepted_tokens=self._accepted,
            prompt_seconds=self._prompt_seconds,
            seconds=self._seconds,
        )
        texts = [each.tail.text for each in sequences if each.tail is not None]
        return Generation(
            prompts=tuple(each.prompt for each in sequences),
            tokens=tuple(tuple(each.new) for each in sequences),
            texts=tuple(texts) if len(texts) == len(sequences) else None,
            stopped=tuple(each.stopped or "" for each in sequences),
            seed=self._seed,
            counts=counts,
        )

    # -- prompts -------------------------------------------------------------------------------------------------------

    def _fill(self, sequence: Sequence) -> None:
        held = len(self._cache.held[sequence.slot])
        rest = sequence.prompt[held:]
        chunk, is_last = rest[:CHUNK], len(rest) <= CHUNK
        (logits,) = self._cache.feed([Feed(sequence.slot, held, chunk, wanted=int(is_last))])
        if not is_last:
            return
        self._take(sequence, logits, Proposal())
        self._filling = None
        if sequence.stopped:
            self._leave(sequence)
        else:
            self._running.append(sequence)

    # -- answers -------------------------------------------------------------------------------------------------------

    def _step(self) -> None:
        running, proposals = self._running, self._propose()
        feeds = [
            Feed(each.slot, len(each.tokens) - 1, [each.tokens[-1], *proposal.tokens], 1 + len(proposal.tokens))
            for each, proposal in zip(running, proposals, strict=True)
        ]
        self._steps += 1
        rows = self._cache.feed(feeds)
        for sequence, proposal, logits in zip(running, proposals, rows, strict=True):
            before = len(sequence.tokens)
            self._take(sequence, logits, proposal)
            new = sequence.tokens[before:]
            self._drafted += len(proposal.tokens)
            self._accepted += sum(a == b for a, b in zip(new, proposal.tokens))
            self._cache.keep(sequence.slot, len(sequence.tokens) - 1)
        for sequence in running:
            if sequence.stopped:
                self._leave(sequence)
        self._running = [each for each in running if not each.stopped]

    def _take(self, sequence: Sequence, logits: Tensor, proposal: Proposal) -> None:
        """Give a sequence its next tokens."""
        self._check(sequence, logits)
        for token in verified(self._sampling, logits, proposal, sequence.seen, sequence.generator):
            sequence.add(token)
            if sequence.stopped:
                return

    @staticmethod
    def _check(sequence: Sequence, logits: Tensor) -> None:
        kind = what_is_wrong(logits)
        if not kind:
            return
        raise GenerationError(
            f"the model's logits are {kind}",
            where=f"prompt {sequence.row + 1}, token {len(sequence.new) + 1} of its answer",
            hint="a weight or an activation has overflowed: check the weights, or load the model in float32",
        )

    def _propose(self) -> Several[Proposal]:
        none = [Proposal()] * len(self._running)
        if self._proposer is None or self._draft is None:
            return none
        # Rows are filled up to the longest, and all must fit.
        room = min(each.room - len(each.tokens) for each in self._running)
        wanted = []
        for each in self._running:
            left = min(each.most - len(each.new), each.room - len(each.tokens)) - 1
            count = max(0, min(self._draft.tokens, room, left))
            wanted.append(Wanted(each.row, each.tokens, count, self._sampling, each.generator, each.choice.names))
        asked = [each for each in wanted if each.count]
        if not asked:
            return none
        found = iter(self._proposer.propose(asked))
        proposals = [next(found) if each.count else Proposal() for each in wanted]
        for request, proposal in zip(wanted, proposals, strict=True):
            self._check_proposal(request, proposal)
        return proposals

    def _check_proposal(self, wanted: Wanted, proposal: Proposal) -> None:
        vocabulary, count = self._cache.session.layout.vocabulary, len(proposal.tokens)
        where = f"draft {type(self._draft).__name__}"
        if count > wanted.count:
            raise InputError(f"proposes {count} tokens where {wanted.count} were wanted", where=where)
        if not all(0 <= token < vocabulary for token in proposal.tokens):
            raise InputError(f"proposes {list(proposal.tokens)}, the vocabulary has {vocabulary}", where=where)
        shape = None if proposal.probabilities is None else tuple(proposal.probabilities.shape)
        if shape is not None and shape != (count, vocabulary):
            raise InputError(f"gives probabilities {list(shape)} for {count} tokens of {vocabulary}", where=where)

    def _leave(self, sequence: Sequence) -> None:
        self._cache.release(sequence.slot)
        if self._proposer is not None:
            self._proposer.forget(sequence.row)
