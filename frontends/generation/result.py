"""What a generation gives: tokens, texts, why each answer ended, counts and times."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

# Why an answer ended: a stop token came; a stop string came; it has as many tokens as were asked for; it was cancelled;
# the cache, or the longest context that the model takes, is full.
REASONS = ("stop_token", "stop_string", "length", "cancelled", "capacity")


@dataclass(frozen=True)
class Counts:
    """What a generation took.

    Attributes:
        prompt_tokens: of all prompts.
        reused_tokens: those of them that a cache held already.
        new_tokens: generated, stop tokens included.
        first_tokens: those of them that came with a prompt, one for each answer.
        steps: decoding steps after the prompts; each takes in one token of every running answer, and its drafts.
        drafted_tokens: proposed by drafts.
        accepted_tokens: those of them that are part of the answers.
        prompt_seconds: spent on prompts.
        seconds: spent on everything after them.
    """

    prompt_tokens: int = 0
    reused_tokens: int = 0
    new_tokens: int = 0
    first_tokens: int = 0
    steps: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    prompt_seconds: float = 0.0
    seconds: float = 0.0

    @property
    def prompt_rate(self) -> float:
        """Prompt tokens computed per second; 0 where none were."""
        computed = self.prompt_tokens - self.reused_tokens
        return computed / self.prompt_seconds if self.prompt_seconds > 0 else 0.0

    @property
    def rate(self) -> float:
        """New tokens per second of the steps after the prompts, all answers together; 0 where there were none."""
        return (self.new_tokens - self.first_tokens) / self.seconds if self.seconds > 0 else 0.0


@dataclass(frozen=True)
class Generation:
    """Answers to prompts, in the prompts' order.

    Attributes:
        prompts: tokens of each prompt.
        tokens: new tokens of each answer; a stop token is the last of them.
        texts: of each answer, without stop tokens and stop strings; ``None`` where there is no tokenizer.
        stopped: why each ended, one of :data:`REASONS`.
        seed: with which the same call gives the same answers.
        counts: what it took.
    """

    prompts: tuple[tuple[int, ...], ...]
    tokens: tuple[tuple[int, ...], ...]
    texts: tuple[str, ...] | None
    stopped: tuple[str, ...]
    seed: int
    counts: Counts

    @property
    def text(self) -> str | None:
        """The first answer's text."""
        return self.texts[0] if self.texts else None

    @property
    def sequences(self) -> list[list[int]]:
        """Prompt and answer of each, as transformers' ``generate`` gives them."""
        return [[*prompt, *new] for prompt, new in zip(self.prompts, self.tokens, strict=True)]

    @property
    def summary(self) -> str:
        """Counts and speeds in one line."""
        counts = self.counts
        speed = f"{counts.new_tokens} tokens, {counts.rate:.1f} tokens/s"
        prompt = (
            f"prompts {counts.prompt_tokens} tokens, {counts.reused_tokens} reused, {counts.prompt_rate:.0f} tokens/s"
        )
        drafts = f", {counts.accepted_tokens} of {counts.drafted_tokens} drafted" if counts.drafted_tokens else ""
        return f"[{speed}{drafts}; {prompt}; {', '.join(self.stopped)}]"

    def as_json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        answers = [
            {"text": text, "tokens": list(new), "stopped": stopped}
            for text, new, stopped in zip(
                self.texts or [None] * len(self.tokens), self.tokens, self.stopped, strict=True
            )
        ]
        rates = {"prompt_tokens_per_s": self.counts.prompt_rate, "tokens_per_s": self.counts.rate}
        return {"answers": answers, "seed": self.seed, "counts": {**asdict(self.counts), **rates}}

    def __str__(self) -> str:
        lines = list(self.texts) if self.texts is not None else [str(list(new)) for new in self.tokens]
        return "\n".join([*lines, self.summary])
