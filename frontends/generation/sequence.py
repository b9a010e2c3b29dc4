"""One prompt and its growing answer."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field

import torch

from graphwright.frontends.generation.adapters import BASE, Choice
from graphwright.frontends.generation.text import TextTail


@dataclass
class Sequence:
    """A prompt and its answer so far.

    Attributes:
        row: its number in the call.
        prompt: its tokens.
        most: new tokens at most.
        room: tokens that prompt and answer may have together.
        stop_tokens: at which the answer ends.
        generator: its own random numbers.
        choice: which adapters answer.
        seen: tokens of prompt and answer, where there is a repetition penalty, bool ``[V]``.
        tail: makes text of the answer, where there is a tokenizer.
        slot: of the cache, while it runs.
        tokens: prompt and answer.
        pieces: text that has become certain since they were last taken.
        stopped: why it has ended.
    """

    row: int
    prompt: tuple[int, ...]
    most: int
    room: int
    stop_tokens: frozenset[int]
    generator: torch.Generator
    choice: Choice = BASE
    seen: torch.Tensor | None = None
    tail: TextTail | None = None
    slot: int = -1
    tokens: list[int] = field(init=False)
    pieces: list[str] = field(default_factory=list)
    stopped: str | None = None

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)

    @property
    def new(self) -> list[int]:
        """The answer's tokens."""
        return self.tokens[len(self.prompt) :]

    def add(self, token: int) -> None:
        """Take the next token, and stop if it is time."""
        self.tokens.append(token)
        if self.seen is not None:
            self.seen[token] = True
        if token in self.stop_tokens:
            self.stop("stop_token")
            return
        if self.tail is not None:
            self.pieces.append(self.tail.push(token))
            if self.tail.is_stopped:
                self.stop("stop_string")
                return
        if len(self.tokens) - len(self.prompt) >= self.most:
            self.stop("length")
        elif len(self.tokens) >= self.room:
            self.stop("capacity")

    def stop(self, reason: str) -> None:
        """End the answer."""
        self.stopped = reason
        if self.tail is not None:
            self.pieces.append(self.tail.finish())


def generator_for(seed: int, prompt: Tokens[int], occurrence: int) -> torch.Generator:
    """Random numbers of one sequence: they depend on the seed and on its prompt, not on what else is in the call.

    Args:
        seed: of the call.
        prompt: its tokens.
        occurrence: how many equal prompts with equal adapters came before it in the call; so that their answers differ.
    """
    text = f"{seed} {occurrence} {','.join(map(str, prompt))}"
    digest = hashlib.sha256(text.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
