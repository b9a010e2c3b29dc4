"""What a generation gives: tokens, texts, why each answer ended, counts and times."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

# Why an answer ended: a stop token came; a stop string came; it has as many tokens as were asked for; it was cancelled;
# the cache, or the longest context that the model takes, is full.
REASONS = ("stop_token", "stop_string", "length", "cancelled", "capacity")


# Trained for it, decoders of the paper change 6 to 17 % of their first predictions.
_MANY_FLIPS = 0.3


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
class Pipelining:
    """What pipelined decoding did; see :mod:`graphwright.frontends.generation.pipelined`.

    Attributes:
        repeats: G, how often the decoder runs its group of layers.
        stages: run.
        lane_stages: the sum over the stages of the answers that took part.
        rows: tokens that went through stages, one for each repetition.
        dropped: tokens in flight that were dropped as a prediction before them changed.
        completed: tokens that have been through all repetitions.
        flips: of these, how many had another prediction after repetition 2, 3, ... G than after the one before it.
        first_flips: of these, how many had another prediction in the end than after the first repetition.
        exit_confidence: the option; where it is set, answers are not those of ordinary decoding.
        early_exits: predictions that were final before the last repetition.
        early_flips: times that a deeper repetition would have changed one of them.
    """

    repeats: int
    stages: int = 0
    lane_stages: int = 0
    rows: int = 0
    dropped: int = 0
    completed: int = 0
    flips: tuple[int, ...] = ()
    first_flips: int = 0
    exit_confidence: float | None = None
    early_exits: int = 0
    early_flips: int = 0

    @property
    def flip_rates(self) -> tuple[float, ...]:
        """How often a prediction changed at repetition 2, 3, ... G; 0 where nothing was completed."""
        return tuple(each / self.completed if self.completed else 0.0 for each in self.flips)

    @property
    def first_flip_rate(self) -> float:
        """How often the first repetition's prediction was not the last one's."""
        return self.first_flips / self.completed if self.completed else 0.0

    @property
    def tokens_per_stage(self) -> float:
        """Tokens that an answer grew by at a stage: 1 at best, ``1 / repeats`` in ordinary decoding."""
        return self.completed / self.lane_stages if self.lane_stages else 0.0

    @property
    def occupancy(self) -> float:
        """How full the pipeline was: 1 where every answer had a token at every repetition."""
        return self.rows / (self.repeats * self.lane_stages) if self.lane_stages else 0.0

    @property
    def gain(self) -> float:
        """Stages that ordinary decoding takes, over those taken: ``repeats`` at best, 1 where nothing is gained."""
        return self.repeats * self.tokens_per_stage

    @property
    def summary(self) -> str:
        """In one line, and that nothing is gained, or little, where that is so."""
        rates = ", ".join(f"{100 * rate:.1f} %" for rate in self.flip_rates)
        text = f"pipeline of {self.repeats}: {self.tokens_per_stage:.2f} tokens/stage, flips {rates}"
        if self.exit_confidence is not None:
            text += f", {self.early_exits} early exits at {self.exit_confidence:g}: not ordinary decoding's answers"
        if self.first_flip_rate > _MANY_FLIPS:
            # Rows beyond the first cost something too.
            amount = "nothing" if self.gain < 1.15 else "little"
            text += f", {amount} is gained: train the model with a loss after every repetition"
        return text


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
        pipeline: what pipelined decoding did, where it was asked for.
    """

    prompts: tuple[tuple[int, ...], ...]
    tokens: tuple[tuple[int, ...], ...]
    texts: tuple[str, ...] | None
    stopped: tuple[str, ...]
    seed: int
    counts: Counts
    pipeline: Pipelining | None = None

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
        stages = f"; {self.pipeline.summary}" if self.pipeline is not None else ""
        return f"[{speed}{drafts}{stages}; {prompt}; {', '.join(self.stopped)}]"

    def as_json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        answers = [
            {"text": text, "tokens": list(new), "stopped": stopped}
            for text, new, stopped in zip(
                self.texts or [None] * len(self.tokens), self.tokens, self.stopped, strict=True
            )
        ]
        rates = {"prompt_tokens_per_s": self.counts.prompt_rate, "tokens_per_s": self.counts.rate}
        found = {"answers": answers, "seed": self.seed, "counts": {**asdict(self.counts), **rates}}
        if self.pipeline is not None:
            found["pipeline"] = {**asdict(self.pipeline), "flip_rates": list(self.pipeline.flip_rates)}
        return found

    def __str__(self) -> str:
        lines = list(self.texts) if self.texts is not None else [str(list(new)) for new in self.tokens]
        return "\n".join([*lines, self.summary])
