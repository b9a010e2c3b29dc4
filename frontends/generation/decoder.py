"""``Decoder``: what can be done with a model whose program is a decoding step."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from graphwright.backends.depth import DepthSchedule
from graphwright.backends.executable import Executable
from graphwright.backends.pipeline import PipelineSession
from graphwright.backends.session import Session
from graphwright.frontends.generation.adapters import UNSAID, Adapters
from graphwright.frontends.generation.drafts import Draft
from graphwright.frontends.generation.facts import DecoderFacts
from graphwright.frontends.generation.options import Options
from graphwright.frontends.generation.prompt_cache import PromptCache
from graphwright.frontends.generation.prompts import Prompts
from graphwright.frontends.generation.result import Generation
from graphwright.frontends.generation.stream import Stream
from graphwright.frontends.generation.tokenizer import check_tokenizer, has_tokenizer, load_tokenizer
from graphwright.ir.decoder import DecoderLayout
from graphwright.ir.errors import InputError
from graphwright.ir.program import Program
from graphwright.passes.adapters.gating import switched_adapters

if TYPE_CHECKING:
    from graphwright.frontends.generation.chat import Chat

S = TypeVar("S", bound=Session)

# Tokens that caches hold where neither the caller nor the model says how many.
_CAPACITY = 2048


class Decoder(ABC):
    """Generation, for whatever has an executable that runs decoding steps.

    Attributes:
        layout: inputs and caches of a step.
        facts: what the model's configuration says: stop tokens, context, where its tokenizer lies.
    """

    layout: DecoderLayout
    facts: DecoderFacts
    _tokenizer: Any = None

    @abstractmethod
    def _lowered(self) -> Executable:
        """What runs the steps."""

    @property
    def step(self) -> Program | None:
        """The program that the steps are, where there is one at hand."""
        return None

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters that every call chooses from, see :class:`~graphwright.passes.GateAdapters`."""
        return () if self.step is None else tuple(switched_adapters(self.step))

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the folder that the model came from, or the one set here; ``None`` where there is none.

        Raises:
            InputError: it cannot be read, or gives tokens that the model does not know.
        """
        folder = self.facts.folder
        if self._tokenizer is None and folder is not None and has_tokenizer(folder):
            self.tokenizer = folder
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, source: Any) -> None:
        tokenizer = load_tokenizer(source)
        check_tokenizer(tokenizer, self.layout.vocabulary)
        self._tokenizer = tokenizer

    @property
    def context(self) -> int | None:
        """Tokens that prompt and answer may have together; ``None`` where the model says nothing of it."""
        limits = [each for each in (self.facts.context, self.layout.length) if each is not None]
        return min(limits, default=None)

    def session(
        self,
        *,
        slots: int = 1,
        capacity: int | None = None,
        cache: str = "float32",
        depth: DepthSchedule | None = None,
    ) -> Session:
        """Caches, and steps on them.

        Args:
            slots: sequences held at a time.
            capacity: tokens that each can hold; the model's context by default.
            cache: how keys and values are stored: ``"float32"``, ``"bfloat16"`` or ``"int8"``; on a GPU also
                ``"float16"``.
            depth: let later tokens of an answer run through fewer layers. This changes answers.

        Raises:
            InputError: there are no slots or no capacity, caches are not stored so, or memory does not suffice.
            BackendError: the target runs no decoding steps, or none at less depth.
            ProgramError: ``depth`` is given, and no layer is repeated, or the weights have been let go of.
        """
        lowered = self._lowered()
        make = lowered.session if depth is None else functools.partial(lowered.scheduled, depth)
        return self._session(make, slots, capacity, cache)

    def pipeline_session(
        self, *, slots: int = 1, capacity: int | None = None, cache: str = "float32"
    ) -> PipelineSession:
        """The same of a decoder that repeats a group of layers, with caches for each repetition.

        Args:
            slots, capacity, cache: as for :meth:`session`.

        Raises:
            InputError: see :meth:`session`.
            BackendError: the target runs no stages.
            ProgramError: the decoder repeats no group of layers.
        """
        return self._session(self._lowered().pipeline, slots, capacity, cache)

    def prompt_cache(
        self,
        *,
        slots: int = 1,
        capacity: int | None = None,
        cache: str = "float32",
        pipeline: bool = False,
        depth: DepthSchedule | None = None,
    ) -> PromptCache:
        """A session that remembers its tokens from call to call: give it as ``cache=`` to :meth:`generate`.

        A prompt that begins like one before it, or like its answer, only computes what is new.

        Raises:
            InputError: see :meth:`session`, and :meth:`pipeline_session` where ``pipeline`` is set; or ``depth`` is
                given too.
        """
        if not pipeline:
            return PromptCache(self.session(slots=slots, capacity=capacity, cache=cache, depth=depth), self)
        if depth is not None:
            raise InputError("stages run through all layers: give pipeline or depth, not both", where="prompt_cache")
        return PromptCache(self.pipeline_session(slots=slots, capacity=capacity, cache=cache), self)

    def _session(self, make: Callable[..., S], slots: int, capacity: int | None, cache: str) -> S:
        tokens = capacity if capacity is not None else self.context or _CAPACITY
        try:
            return make(slots=slots, capacity=tokens, cache=cache)
        except (RuntimeError, MemoryError) as error:
            if isinstance(error, RuntimeError) and "alloc" not in str(error):
                raise
            width = {"int8": 1, "bfloat16": 2, "float16": 2}.get(cache, 4)
            size = self.layout.cache_bytes(slots, tokens, width) / 2**30
            raise InputError(
                f"the caches of {slots} sequences of {tokens} tokens need {size:.1f} GiB, which cannot be had",
                where="session",
                hint="take a smaller capacity, max_new_tokens or batch_size, or cache='int8'",
            ) from error

    def generate(
        self,
        prompts: Prompts,
        *,
        attention_mask: torch.Tensor | None = None,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        stop_tokens: Iterable[int] | None = None,
        stop: str | Sequence[str] = (),
        seed: int | None = None,
        cache: str | PromptCache = "float32",
        draft: str | Draft | Decoder | None = None,
        draft_tokens: int | None = None,
        tokenizer: Any = None,
        batch_size: int = 16,
        adapters: Adapters | Sequence[Adapters] = UNSAID,
        pipeline: bool = False,
        exit_confidence: float | None = None,
    ) -> Generation:
        """Answer prompts.

        Each prompt has a slot of its own, so they need no padding; up to ``batch_size`` run together, and the next one
        begins where one has ended. A prompt is taken in up to 512 tokens at a time.

        Args:
            prompts: a string or several, the tokens of one prompt or of several, or int ``[B, S]``.
            attention_mask: for a tensor: 0 where there is padding, which is cut off.
            max_new_tokens: of each answer.
            temperature: 0 for the likeliest token, else see :class:`Sampling`, as for the next four.
            top_k: 0 for all tokens.
            top_p: 1 for all tokens.
            min_p: 0 for all tokens.
            repetition_penalty: 1 for none.
            stop_tokens: end an answer; the model's own by default, none where it is empty.
            stop: strings that end an answer and are no part of its text.
            seed: of sampling; drawn from torch's generator by default, and told in the result. An answer depends on
                the seed and its own prompt, not on other prompts (up to how kernels round rows that run together).
            cache: how keys and values are stored, or a :meth:`prompt_cache`.
            draft: guesses tokens ahead: a smaller decoder, ``"prompt-lookup"``, or a :class:`Draft`. Answers stay what
                they are without one, see :mod:`graphwright.frontends.generation.verification`.
            draft_tokens: guessed at a time.
            tokenizer: instead of :attr:`tokenizer`.
            batch_size: sequences that run together at most; ``cache`` decides when it is a prompt cache.
            adapters: which of :attr:`adapters` answer: a name, several with their weights as ``{"a": 0.5, "b": 0.5}``,
                ``None`` for the base alone, or a list of one of these for each prompt. Required where there are any.
            pipeline: start each token on what the first repetition of the decoder's layers guesses before it, see
                :mod:`graphwright.frontends.generation.pipelined`. For decoders that repeat a group of layers; answers
                stay what they are without it (up to how kernels round rows that run together), and the result says how
                often guesses changed. It gains much where the model was trained with a loss after each repetition.
            exit_confidence: with ``pipeline``, take a prediction as final as soon as the likeliest token has this
                probability. This changes answers.

        Raises:
            InputError: a prompt or an option cannot be used; nothing has run then.
            GenerationError: the model's logits are NaN or infinite.
            BackendError: the target runs no decoding steps, or no stages.
            ProgramError: ``pipeline`` is set, and the decoder repeats no group of layers.
        """
        options = Options(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            stop_tokens=stop_tokens,
            stop=stop,
            seed=seed,
            cache=cache,
            draft=draft,
            draft_tokens=draft_tokens,
            tokenizer=tokenizer,
            batch_size=batch_size,
            adapters=adapters,
            pipeline=pipeline,
            exit_confidence=exit_confidence,
        )
        with options.make_run(self, prompts, attention_mask) as run:
            while not run.is_done:
                run.advance()
        return run.result()

    def stream(self, prompt: Prompts, **options: Any) -> Stream:
        """Answer one prompt, and give the answer as it comes: text, or tokens where there is no tokenizer.

        Args:
            prompt: one prompt in any form that :meth:`generate` takes.
            options: of :meth:`generate`.

        Raises:
            InputError: there are several prompts, or see :meth:`generate`; nothing has run then.
        """
        mask = options.pop("attention_mask", None)
        run = Options.read(options).make_run(self, prompt, mask)
        if len(run.sequences) != 1:
            raise InputError(f"takes one prompt, not {len(run.sequences)}", where="stream", hint="use generate()")
        return Stream(run)

    def chat(self, *, system: str | None = None, **options: Any) -> Chat:
        """A conversation that keeps its cache.

        Args:
            system: what the model is told first, where its chat template has a place for it.
            options: of :meth:`generate`, for every answer, and ``capacity`` of the cache.

        Raises:
            InputError: there is no tokenizer, or an option cannot be used.
        """
        from graphwright.frontends.generation.chat import Chat

        return Chat(self, system=system, **options)
