"""``Chat``: a conversation, and the cache that holds it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from graphwright.frontends.generation.options import Options, find_draft
from graphwright.frontends.generation.prompt_cache import PromptCache
from graphwright.frontends.generation.result import Generation
from graphwright.frontends.generation.stream import Stream
from graphwright.frontends.generation.tokenizer import check_tokenizer, load_tokenizer
from graphwright.ir.errors import InputError

if TYPE_CHECKING:
    from graphwright.frontends.generation.decoder import Decoder


class Chat:
    """Messages and answers. Each turn computes only what is new since the last.

    The tokenizer's chat template spells the conversation; without one the model just continues the text, each message
    on a line of its own.

    Args:
        decoder: answers.
        system: what the model is told first; only where there is a chat template.
        capacity: tokens of the whole conversation; the model's context by default.
        options: of :meth:`Decoder.generate`, for every answer.

    Attributes:
        messages: ``{"role": …, "content": …}`` of every turn, the unfinished answer of a cancelled one included.

    Raises:
        InputError: there is no tokenizer, or an option cannot be used.
    """

    def __init__(
        self, decoder: Decoder, *, system: str | None = None, capacity: int | None = None, **options: Any
    ) -> None:
        self._decoder, self._system = decoder, system
        tokenizer = options.pop("tokenizer", None)
        if tokenizer is None:
            self._tokenizer = decoder.tokenizer
        else:
            self._tokenizer = load_tokenizer(tokenizer)
            check_tokenizer(self._tokenizer, decoder.layout.vocabulary)
        if self._tokenizer is None:
            raise InputError("needs a tokenizer", where="chat", hint="set decoder.tokenizer to one, or to its folder")
        self._has_template = bool(getattr(self._tokenizer, "chat_template", None))
        if system is not None and not self._has_template:
            raise InputError("has no place: the tokenizer has no chat template", where="argument 'system'")
        cache = options.pop("cache", "float32")
        Options.read(options)
        options["draft"] = find_draft(options.get("draft"), options.pop("draft_tokens", None), "float32")
        if not isinstance(cache, PromptCache):
            cache = decoder.prompt_cache(capacity=capacity, cache=cache, pipeline=options.get("pipeline", False))
        self._options = {**options, "cache": cache, "tokenizer": self._tokenizer}
        self._open: Stream | None = None
        self._tokens: list[int] = []
        self.messages: list[dict[str, str]] = []
        self.reset()

    def reset(self) -> None:
        """Forget the conversation; what the system was told stays."""
        self._close()
        self._tokens = []
        self.messages = [{"role": "system", "content": self._system}] if self._system is not None else []

    def stream(self, message: str, **options: Any) -> Stream:
        """Say something, and get the answer as it comes. An earlier answer still coming is cancelled.

        Args:
            message: not empty.
            options: of :meth:`Decoder.generate`, for this answer.

        Raises:
            InputError: the message is empty, or the conversation has become longer than the cache; it is as before.
        """
        if not message:
            raise InputError("is empty", where="message")
        self._close()
        messages = [*self.messages, {"role": "user", "content": message}]
        prompt = self._prompt(messages)
        stream = self._decoder.stream(prompt, **{**self._options, **options})
        stream.when_done(lambda result: self._answered(messages, result))
        self._open = stream
        return stream

    def send(self, message: str, **options: Any) -> Generation:
        """Say something, and wait for the answer; see :meth:`stream`."""
        with self.stream(message, **options) as stream:
            for _ in stream:
                pass
        return stream.result

    def _prompt(self, messages: list[dict[str, str]]) -> list[int]:
        if not self._has_template:
            text = messages[-1]["content"]
            if not self._tokens:
                return [int(token) for token in self._tokenizer.encode(text)]
            more = self._tokenizer.encode(f"\n{text}", add_special_tokens=False)
            return [*self._tokens, *(int(token) for token in more)]
        try:
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # whatever jinja, or the template itself, raises
            raise InputError(
                f"the tokenizer's chat template refuses this conversation: {error}",
                where="chat",
                hint="some templates take no system message",
            ) from error
        return [int(token) for token in self._tokenizer.encode(text, add_special_tokens=False)]

    def _answered(self, messages: list[dict[str, str]], result: Generation) -> None:
        answer = result.tokens[0]
        kept = answer[:-1] if result.stopped[0] == "stop_token" else answer
        self._tokens = [*result.prompts[0], *kept]
        self.messages = [*messages, {"role": "assistant", "content": result.text or ""}]
        self._open = None

    def _close(self) -> None:
        if self._open is not None:
            self._open.close()
