"""The options of one generation, and the run they make."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from graphwright.frontends.generation.adapters import UNSAID, Adapters, read_choices
from graphwright.frontends.generation.drafts import Draft, PromptLookup
from graphwright.frontends.generation.pipelined import PipelinedRun
from graphwright.frontends.generation.prompt_cache import PromptCache
from graphwright.frontends.generation.prompts import Prompts, check_prompts, read_prompts
from graphwright.frontends.generation.run import Run
from graphwright.frontends.generation.sampling import Sampling
from graphwright.frontends.generation.sequence import Sequence as Growing
from graphwright.frontends.generation.sequence import generator_for
from graphwright.frontends.generation.text import TextTail
from graphwright.frontends.generation.tokenizer import check_tokenizer, load_tokenizer
from graphwright.ir.errors import InputError

if TYPE_CHECKING:
    from graphwright.frontends.generation.decoder import Decoder


@dataclass(frozen=True)
class Options:
    """See :meth:`Decoder.generate`."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop_tokens: Iterable[int] | None = None
    stop: str | Sequence[str] = ()
    seed: int | None = None
    cache: str | PromptCache = "float32"
    draft: str | Draft | Decoder | None = None
    draft_tokens: int | None = None
    tokenizer: Any = None
    batch_size: int = 16
    adapters: Adapters | Sequence[Adapters] = UNSAID
    pipeline: bool = False
    exit_confidence: float | None = None

    @staticmethod
    def read(given: Mapping[str, Any]) -> Options:
        """Options by name.

        Raises:
            InputError: there is none of a name.
        """
        names = [field.name for field in dataclasses.fields(Options)]
        for name in given:
            if name not in names:
                raise InputError(
                    f"there is no option {name!r}", where="generation", hint=f"options: {', '.join(names)}"
                )
        return Options(**given)

    def make_run(self, decoder: Decoder, prompts: Prompts, attention_mask: torch.Tensor | None = None) -> Run:
        """Everything checked, and nothing run yet.

        Raises:
            InputError: an option or a prompt cannot be used.
        """
        _check_count("max_new_tokens", self.max_new_tokens)
        _check_count("batch_size", self.batch_size)
        self._check_pipeline(decoder)
        sampling = Sampling(
            float(self.temperature), self.top_k, float(self.top_p), float(self.min_p), float(self.repetition_penalty)
        )
        vocabulary, context = decoder.layout.vocabulary, decoder.context
        tokenizer = self._tokenizer(decoder)
        tokens = read_prompts(prompts, attention_mask, tokenizer)
        ends, stop = self._stop_tokens(decoder, tokenizer), self._stop_strings(tokenizer)
        draft = find_draft(self.draft, self.draft_tokens, self.cache if isinstance(self.cache, str) else "float32")
        limits = [context] if context is not None else []
        if isinstance(self.cache, PromptCache):
            limits.append(self.cache.session.capacity)
        room = min(limits) if limits else max(map(len, tokens)) + self.max_new_tokens
        check_prompts(tokens, vocabulary, room)
        choices = read_choices(decoder, self.adapters, len(tokens))
        cache = self._cache(decoder, tokens, room, draft)
        seed = int(torch.randint(2**62, ())) if self.seed is None else int(self.seed)
        equal: Counter[tuple[tuple[int, ...], tuple[float, ...]]] = Counter()
        sequences = []
        for row, prompt in enumerate(map(tuple, tokens)):
            choice = choices[row]
            generator = generator_for(seed, prompt, equal[prompt, choice.weights])
            equal[prompt, choice.weights] += 1
            sequence = Growing(row, prompt, self.max_new_tokens, room, ends, generator, choice)
            sequence.seen = sampling.seen(prompt, vocabulary)
            sequence.tail = None if tokenizer is None else TextTail(tokenizer, prompt, stop)
            sequences.append(sequence)
        if self.pipeline:
            return PipelinedRun(cache, sequences, sampling, seed=seed, exit_confidence=self.exit_confidence)
        return Run(cache, sequences, sampling, draft=draft, seed=seed)

    def _check_pipeline(self, decoder: Decoder) -> None:
        where, confidence = "argument 'exit_confidence'", self.exit_confidence
        if self.pipeline and decoder.adapters:
            raise InputError(
                f"stages cannot choose between the adapters {', '.join(decoder.adapters)}",
                where="argument 'pipeline'",
                hint="a decoder with one adapter, not gated, can be pipelined",
            )
        if self.pipeline and self.draft is not None:
            raise InputError(
                "cannot be had with pipeline=True, which guesses by itself",
                where="argument 'draft'",
                hint="leave one of them out",
            )
        if confidence is not None and not self.pipeline:
            raise InputError("is for pipelined decoding", where=where, hint="give pipeline=True too")
        if confidence is not None and not (isinstance(confidence, int | float) and 0 < confidence <= 1):
            raise InputError(f"must be above 0 and at most 1, not {confidence!r}", where=where)

    def _tokenizer(self, decoder: Decoder) -> Any:
        if self.tokenizer is None:
            return decoder.tokenizer
        tokenizer = load_tokenizer(self.tokenizer)
        check_tokenizer(tokenizer, decoder.layout.vocabulary)
        return tokenizer

    def _stop_tokens(self, decoder: Decoder, tokenizer: Any) -> frozenset[int]:
        if self.stop_tokens is None:
            own = getattr(tokenizer, "eos_token_id", None)
            return frozenset(decoder.facts.with_stop_tokens([own]).stop_tokens)
        tokens = frozenset(int(token) for token in self.stop_tokens)
        for token in tokens:
            if not 0 <= token < decoder.layout.vocabulary:
                raise InputError(
                    f"{token} is not in the vocabulary of {decoder.layout.vocabulary}", where="argument 'stop_tokens'"
                )
        return tokens

    def _stop_strings(self, tokenizer: Any) -> tuple[str, ...]:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if stop and tokenizer is None:
            raise InputError("needs a tokenizer", where="argument 'stop'", hint="give tokenizer=, or stop_tokens=")
        for each in stop:
            if not isinstance(each, str) or not each:
                raise InputError(f"{each!r} is not a string to stop at", where="argument 'stop'")
        return stop

    def _cache(self, decoder: Decoder, tokens: list[list[int]], room: int, draft: Draft | None) -> PromptCache:
        if isinstance(self.cache, PromptCache):
            if self.cache.owner is not decoder:
                raise InputError("is another decoder's", where="argument 'cache'", hint="make it with prompt_cache()")
            return self.cache
        longest = min(max(map(len, tokens)) + self.max_new_tokens, room)
        # Rows with fewer drafted tokens than others are filled up behind their end.
        capacity = longest + (draft.tokens if draft is not None else 0)
        slots = min(len(tokens), self.batch_size)
        return decoder.prompt_cache(slots=slots, capacity=capacity, cache=self.cache, pipeline=self.pipeline)


def find_draft(draft: Any, tokens: int | None, cache: str) -> Draft | None:
    """A draft from what a caller may give for one.

    Raises:
        InputError: it is none.
    """
    from graphwright.frontends.generation.decoder import Decoder
    from graphwright.frontends.generation.decoder_draft import DecoderDraft

    if tokens is not None:
        _check_count("draft_tokens", tokens)
    if draft is None or isinstance(draft, Draft):
        return draft
    if draft == "prompt-lookup":
        return PromptLookup() if tokens is None else PromptLookup(tokens)
    if isinstance(draft, Decoder):
        return DecoderDraft(draft, cache=cache) if tokens is None else DecoderDraft(draft, tokens, cache)
    raise InputError(
        f"{draft!r} is no draft" if isinstance(draft, str) else f"a {type(draft).__name__} is no draft",
        where="argument 'draft'",
        hint="give a smaller decoder, 'prompt-lookup', PromptLookup(...) or a Draft of your own",
    )


def _check_count(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"must be a whole number, 1 or more, not {value!r}", where=f"argument {name!r}")
