"""Tokens to text as they come: whole characters only, and nothing that may yet become a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# Tokens that are decoded together with the new ones. A character has at most 4 bytes, so at most 4 tokens; the rest is
# for tokenizers whose spaces depend on what stands before.
_CONTEXT = 8
_REPLACEMENT = "\ufffd"  # what bytes that are no character yet decode to


class TextTail:
    """The text of a growing answer.

    Args:
        tokenizer: has ``decode``.
        prompt: tokens before the answer, which decide whether it begins with a space.
        stop: strings at which the text ends; they are no part of it.

    Attributes:
        is_stopped: whether a stop string has come.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._window = list(prompt[-_CONTEXT:])
        self._seen = len(self._decode().rstrip(_REPLACEMENT))
        self._pending = ""
        self._parts: list[str] = []
        self.is_stopped = False

    @property
    def text(self) -> str:
        """All that :meth:`push` and :meth:`finish` have given."""
        return "".join(self._parts)

    def push(self, token: int) -> str:
        """Take a token in; gives the text that is now certain, which may be empty."""
        self._window.append(token)
        decoded = self._decode()
        whole = decoded.rstrip(_REPLACEMENT)
        self._pending += whole[self._seen :]
        self._seen = max(self._seen, len(whole))
        if len(self._window) > 2 * _CONTEXT and whole == decoded:
            del self._window[:-_CONTEXT]
            self._seen = len(self._decode())
        return self._give(self._certain())

    def finish(self) -> str:
        """What was held back because a stop string might have come. Bytes that are no whole character are left out."""
        certain, self._pending = self._pending, ""
        return self._give(certain)

    def _certain(self) -> str:
        found = [at for stop in self._stop if (at := self._pending.find(stop)) >= 0]
        if found:
            self.is_stopped = True
            certain, self._pending = self._pending[: min(found)], ""
            return certain
        held = max((_overlap(self._pending, stop) for stop in self._stop), default=0)
        cut = len(self._pending) - held
        certain, self._pending = self._pending[:cut], self._pending[cut:]
        return certain

    def _give(self, text: str) -> str:
        if text:
            self._parts.append(text)
        return text

    def _decode(self) -> str:
        text: str = self._tokenizer.decode(self._window, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of the text that is a beginning of the stop string, and not all of it."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
