"""Comparing an exported decoder with its program, step by step, each on its own caches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from graphwright.backends.onnx.comparison import (
    Difference,
    ExampleInputs,
    flat_examples,
    refuse_unexplained,
    table_rows,
    tolerance_of,
)
from graphwright.backends.onnx.noise import TRIALS, Gap, difference, disturbed, run, with_rounded_activations
from graphwright.backends.onnx.options import ExportOptions
from graphwright.backends.onnx.runtime import Session
from graphwright.ir.decoder import DecoderLayout
from graphwright.ir.program import Program

# Prompts of different lengths with single tokens after them, and one prompt in two pieces.
_TALKS: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = (((7, 4, 2), (1, 1)), ((3,), (4,)))
_CACHES = "caches"


@dataclass(frozen=True)
class Step:
    """Tokens that rows bring.

    Attributes:
        tokens: int64 ``[B, S]``, filled up behind the end of shorter rows.
        starts: what each row holds before.
        ends: what each row holds after.
    """

    tokens: torch.Tensor
    starts: torch.Tensor
    ends: torch.Tensor

    @property
    def sizes(self) -> str:
        """The step in words."""
        rows, length = self.tokens.shape
        return f"batch={rows} tokens={length} past={int(self.starts.max())}"


# Steps of the same rows, one after the other.
Conversation: TypeAlias = list[Step]
# What is compared: the logits of every step as [tokens, V], and at the end what was written into the caches.
_Results: TypeAlias = list[torch.Tensor]


def make_conversations(program: Program, examples: ExampleInputs | None) -> list[Conversation]:
    """Steps to compare on; their tokens are those of the examples, or any.

    Raises:
        InputError: the examples do not fit the program.
    """
    generator = torch.Generator().manual_seed(0)
    if examples is not None:
        pool = flat_examples(program, examples)[0].flatten()
    else:
        known = table_rows(program, program.inputs[0]) or DecoderLayout.of(program).vocabulary
        pool = torch.randint(0, known, (64,), generator=generator)
    talks: list[Conversation] = []
    for lengths, later in _TALKS:
        held, steps = torch.zeros(len(lengths), dtype=torch.int64), []
        for new in (torch.tensor(lengths), *[torch.full((len(lengths),), each) for each in later]):
            chosen = torch.randint(0, len(pool), (len(lengths), int(new.max())), generator=generator)
            steps.append(Step(pool[chosen], held, held + new))
            held = held + new
        talks.append(steps)
    return talks


def compare_steps(
    program: Program,
    session: Session,
    talks: Sequence[Conversation],
    options: ExportOptions,
    *,
    tolerance: float | None,
) -> list[Difference]:
    """Run both through conversations.

    Args:
        program: a decoding step.
        session: the file, opened.
        talks: what to run.
        options: of the export.
        tolerance: largest absolute difference; measured when left out.

    Raises:
        ExportError: logits or caches differ by more than the tolerance.
        BackendError: onnxruntime fails.
    """
    found: list[Difference] = []
    limits: dict[str, Gap] = {}
    for talk in talks:
        wanted = _through_program(program, lambda *inputs: run(program, inputs), talk, options)
        results = _through_session(program, session, talk, options)
        # Steps of the plain program cost the most, so what the first conversation allows serves for all.
        limits = limits or _limits(program, talk, wanted, options, tolerance)
        for (name, sizes), one, other in zip(_names(talk), wanted, results, strict=True):
            scale = float(one.double().pow(2).mean().sqrt())
            found.append(Difference(name, sizes, difference(one, other), limits[name], scale))
    refuse_unexplained(found)
    return found


def _names(talk: Conversation) -> Iterator[tuple[str, str]]:
    for step in talk:
        yield "logits", step.sizes
    yield _CACHES, f"batch={len(talk[-1].tokens)} past={int(talk[-1].ends.max())}"


def _limits(
    program: Program, talk: Conversation, wanted: _Results, options: ExportOptions, tolerance: float | None
) -> dict[str, Gap]:
    names = [name for name, _ in _names(talk)]
    if tolerance is not None:
        return dict.fromkeys(names, Gap(tolerance, tolerance))
    generator = torch.Generator().manual_seed(0)
    calls = [disturbed(program, generator) for _ in range(TRIALS)]
    rounding = _largest(names, wanted, [_through_program(program, call, talk, options) for call in calls])
    if options.accuracy_level != 4:
        return {name: tolerance_of(gap, None) for name, gap in rounding.items()}
    results = _through_program(program, with_rounded_activations(program), talk, options)
    rounded = _largest(names, wanted, [results])
    return {name: tolerance_of(gap, rounded[name]) for name, gap in rounding.items()}


def _largest(names: Sequence[str], wanted: _Results, trials: Sequence[_Results]) -> dict[str, Gap]:
    """The largest difference of each kind of result, over all steps and trials."""
    gaps = dict.fromkeys(names, Gap(0.0, 0.0))
    for results in trials:
        for name, one, other in zip(names, wanted, results, strict=True):
            gaps[name] |= difference(one, other)
    return gaps


def _through_program(
    program: Program, call: Callable[..., tuple[Any, ...]], talk: Conversation, options: ExportOptions
) -> _Results:
    layout, ends = DecoderLayout.of(program), talk[-1].ends
    slots = torch.arange(len(ends))
    # Room for what fills up shorter prompts, too.
    capacity = max(int(step.starts.max()) + step.tokens.shape[1] for step in talk) + 1
    caches: Sequence[torch.Tensor] = [
        torch.zeros(len(ends), heads, capacity, width, dtype=node.meta["val"].dtype)
        for (heads, width), node in zip((*layout.keys, *layout.values), layout.caches(program), strict=True)
    ]
    results: _Results = []
    for step in talk:
        new = step.ends - step.starts
        rows = torch.arange(step.tokens.shape[1]).repeat(len(new), 1) if options.logits == "all" else new[:, None] - 1
        logits, *caches = call(step.tokens, slots, step.starts, rows, *caches, *_weights(layout, talk))
        results.append(_wanted(logits, new))
    return [*results, _written(caches, ends)]


def _through_session(program: Program, session: Session, talk: Conversation, options: ExportOptions) -> _Results:
    layout = DecoderLayout.of(program)
    layers, shapes = layout.layers, [node.meta["val"] for node in layout.caches(program)]
    order = [half * layers + layer for layer in range(layers) for half in (0, 1)]
    caches = [
        torch.zeros(len(talk[0].ends), shapes[index].shape[1], 0, shapes[index].shape[3], dtype=shapes[index].dtype)
        for index in order
    ]
    results: _Results = []
    for step in talk:
        # A row that ends early has zeros in the mask.
        mask = (torch.arange(int(step.ends.max())) < step.ends.unsqueeze(1)).long()
        new = step.ends - step.starts
        rows = [new.unsqueeze(1) - 1] if options.logits == "rows" else []
        logits, *caches = session.run([step.tokens, mask, *rows, *caches, *_weights(layout, talk)])
        results.append(_wanted(logits, new))
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return [*results, _written([caches[index] for index in inverse], talk[-1].ends)]


def _weights(layout: DecoderLayout, talk: Conversation) -> list[torch.Tensor]:
    """Weights of adapters for the rows of a conversation, others in every row, where adapters are switched."""
    if not layout.adapters:
        return []
    return [torch.rand(len(talk[0].ends), layout.adapters, generator=torch.Generator().manual_seed(0))]


def _wanted(logits: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Logits ``[B, 1 or S, V]`` of the tokens that were brought, not of what fills up: ``[tokens, V]``."""
    return torch.cat([row[: int(count)] for row, count in zip(logits, new, strict=True)])


def _written(caches: Sequence[torch.Tensor], ends: torch.Tensor) -> torch.Tensor:
    """Everything that caches hold up to each row's end, flattened."""
    return torch.cat([cache[row, :, : int(end)].flatten() for cache in caches for row, end in enumerate(ends.tolist())])
