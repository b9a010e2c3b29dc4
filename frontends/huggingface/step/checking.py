"""Before a model is traced as a step: what its caches look like, and whether it computes the same that way. And whether
the trace does, at other sizes."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from graphwright.frontends.huggingface.step.attention import Step
from graphwright.frontends.huggingface.step.families import Family
from graphwright.frontends.huggingface.step.running import own_attention, run_step
from graphwright.ir.conditions import holds
from graphwright.ir.decoder import draw_step
from graphwright.ir.errors import GraphwrightError, TraceError
from graphwright.ir.program import Program
from graphwright.passes.verification.comparison import compare

# How long a text the model is compared on, and in which pieces the step takes it.
_TEXT, _PIECES = 24, (15, 8, 1)

# Root mean square of the difference over that of the logits.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}

# batch, tokens, selected, slots, capacity: unlike those traced, then 1 wherever that is possible
_SIZES = ((3, 4, 2, 5, 9), (1, 6, 1, 3, 8), (2, 1, 1, 2, 7), (1, 1, 1, 1, 1), (2, 3, 0, 3, 3))
_NAMES = ("batch", "tokens", "selected", "slots", "capacity")


def find_caches(model: Any, family: Family | None, slots: int, capacity: int) -> tuple[list[Any], list[Any]]:
    """Empty keys and values of every layer, found by running one step.

    Raises:
        TraceError: not every layer attends over a cache, or its attention is none that fits.
    """
    tokens = _tokens(model, 2, min(5, capacity))
    step = Step(torch.tensor([2, 0]), torch.zeros(2, dtype=torch.int64), {}, {}, room=(slots, capacity), look=True)
    with own_attention(model, family), _explained(model):
        run_step(model, step, tokens, torch.zeros(2, 1, dtype=torch.int64))
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    missing = sorted(set(range(layers)) - step.done)
    if missing:
        raise TraceError(
            f"layers {missing} do not attend through transformers' attention interface",
            where=type(model).__name__,
            hint="recurrent layers and models with an attention of their own cannot be traced as a decoding step",
        )
    order = range(layers)
    return [step.keys[layer] for layer in order], [step.values[layer] for layer in order]


def check_model(model: Any, stepped: nn.Module, caches: tuple[list[Any], list[Any]], family: Family | None) -> None:
    """Compare logits of a short text, as the model computes them and in steps of several tokens.

    Raises:
        TraceError: they differ.
    """
    longest = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or _TEXT
    tokens = _tokens(model, 2, min(_TEXT, longest, caches[0][0].shape[2]))
    wanted = model(input_ids=tokens, use_cache=False, return_dict=True).logits
    slots = torch.tensor([2, 0])
    keys, values = ([torch.full_like(cache, float("nan")) for cache in side] for side in caches)
    found: list[torch.Tensor] = []
    begin = 0
    with own_attention(model, family), _explained(model):
        for size in _PIECES:
            piece = tokens[:, begin : begin + size]
            if piece.shape[1] == 0:
                break
            rows = torch.arange(piece.shape[1]).expand(2, -1)
            result = stepped(piece, slots, torch.full((2,), begin), rows, keys, values)
            keys, values = result["keys"], result["values"]
            found.append(result["logits"])
            begin += size
    difference = compare(torch.cat(found, dim=1), wanted)
    limit = max(_TOLERANCE.get(wanted.dtype, 0.0), family.error if family is not None else 0.0)
    if not difference.relative <= limit:
        raise TraceError(
            f"its logits are off by {difference.relative:.2g} {difference.reason}".rstrip()
            + " when it runs in steps with a cache",
            where=type(model).__name__,
            hint="its attention does something that a cache of keys and values does not hold",
        )


def check_program(program: Program, stepped: nn.Module, model: Any, family: Family | None) -> None:
    """Compare the trace with the model it came from at other sizes, and let every size start at 1.

    Raises:
        TraceError: they differ.
    """
    symbols = program.symbols
    generator = torch.Generator().manual_seed(0)
    for numbers in _SIZES:
        sizes = dict(zip(_NAMES, numbers, strict=True))
        inputs = draw_step(program, sizes, generator)
        layers = (len(inputs) - 4) // 2
        try:
            with own_attention(model, family):
                wanted = pytree.tree_leaves(stepped(*inputs[:4], inputs[4 : 4 + layers], inputs[4 + layers :]))
            found = program.body(*inputs)
        except (RuntimeError, ValueError, IndexError) as error:
            reason = str(error).strip().splitlines()[0]
            raise _sizes_differ(model, sizes, f"it fails with {reason}") from error
        difference = compare(list(found), wanted)
        if not difference.worst <= _TOLERANCE.get(wanted[0].dtype, 0.0):
            raise _sizes_differ(model, sizes, f"it is off by {difference.worst:.2g} {difference.reason}".rstrip())
        symbols.conditions = tuple(each for each in symbols.conditions if holds(each, sizes))
    for name, dim in list(symbols.dims.items()):
        symbols.dims[name] = dataclasses.replace(dim, min=1)


@contextlib.contextmanager
def _explained(model: Any) -> Iterator[None]:
    """Whatever the model's own code raises when it gets another attention, as a TraceError."""
    try:
        yield
    except GraphwrightError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise TraceError(
            f"cannot run with a cache of its own for each step: {type(error).__name__}: {reason[0]}",
            where=type(model).__name__,
            hint="only models that attend through transformers' attention interface can be traced as a decoding step",
        ) from error


def _sizes_differ(model: Any, sizes: dict[str, int], reason: str) -> TraceError:
    given = ", ".join(f"{name} = {size}" for name, size in sizes.items())
    return TraceError(f"the trace holds for the traced sizes only: {reason} with {given}", where=type(model).__name__)


def _tokens(model: Any, batch: int, length: int) -> torch.Tensor:
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    return torch.randint(0, vocabulary, (batch, length), generator=torch.Generator().manual_seed(0))
