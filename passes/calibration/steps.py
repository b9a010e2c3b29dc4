"""Texts for a decoding step: one step from empty caches that brings all tokens and wants all rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from graphwright.ir.decoder import ADAPTER_WEIGHTS, DecoderLayout
from graphwright.ir.errors import InputError
from graphwright.ir.program import Program
from graphwright.ir.types import VAL

_KNOWN = ("input_ids", "attention_mask")


def first_step(
    program: Program, layout: DecoderLayout, batch: Mapping[str, Any]
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The inputs of a step that brings texts, see :class:`graphwright.ir.decoder.DecoderLayout`.

    Every text has a slot of its own and begins at position 0; padding in front of it is moved behind it, where causal
    attention does not see it. Rows are all positions, so that what is computed for wanted rows only sees every token.
    The caches are zeros that take no memory.

    Args:
        program: a decoding step.
        layout: its layout.
        batch: ``input_ids``, token ids int64 ``[B, S]``, and optionally ``attention_mask`` ``[B, S]``, 0 at padding.
            Where adapters are switched, also ``adapter_weights`` ``[B, adapters]``.

    Returns:
        the inputs in order, and a mask ``[B, S]``, bool, of what is no padding.

    Raises:
        InputError: there is anything else in the batch, the padding is not at an end, or the texts are too long.
    """
    known = (*_KNOWN, ADAPTER_WEIGHTS) if layout.adapters else _KNOWN
    unknown = [name for name, value in batch.items() if name not in known and value is not None]
    if unknown:
        raise InputError(
            "is not among what a decoder's calibration batch has",
            where=f"argument {unknown[0]!r}",
            hint="give input_ids and, with padding, attention_mask",
        )
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.is_floating_point() or ids.numel() == 0:
        shown = list(ids.shape) if isinstance(ids, torch.Tensor) else type(ids).__name__
        raise InputError(f"must be token ids [batch, tokens], not {shown}", where="input 'input_ids'")
    if mask is not None and (not isinstance(mask, torch.Tensor) or mask.shape != ids.shape):
        raise InputError(f"must be like input_ids, {list(ids.shape)}", where="input 'attention_mask'")
    ids, present = _padded_behind(ids.to(torch.int64), mask)
    count, tokens = ids.shape
    if layout.length is not None and tokens > layout.length:
        raise InputError(
            f"has {tokens} tokens, the program has positions for {layout.length}",
            where="input 'input_ids'",
            hint="give shorter texts, or prepare the decoder for longer ones: PrepareDecoder(length=...)",
        )
    if int(ids.min()) < 0 or int(ids.max()) >= layout.vocabulary:
        raise InputError(
            f"holds token ids from {int(ids.min())} to {int(ids.max())}, the vocabulary has {layout.vocabulary}",
            where="input 'input_ids'",
            hint="encode the text with the model's own tokenizer",
        )
    steps = [ids, torch.arange(count), torch.zeros(count, dtype=torch.int64), torch.arange(tokens).expand(count, -1)]
    for node, (heads, width) in zip(layout.caches(program), (*layout.keys, *layout.values), strict=True):
        steps.append(torch.zeros((), dtype=node.meta[VAL].dtype).expand(count, heads, tokens, width))
    if layout.adapters:
        steps.append(_weights(batch.get(ADAPTER_WEIGHTS), count, layout.adapters))
    return steps, present


def _weights(given: Any, count: int, adapters: int) -> torch.Tensor:
    """Of the adapters, for every text."""
    if not isinstance(given, torch.Tensor) or given.shape != (count, adapters):
        shown = list(given.shape) if isinstance(given, torch.Tensor) else type(given).__name__
        raise InputError(
            f"must be weights [{count}, {adapters}] of the adapters that are switched, not {shown}",
            where=f"input {ADAPTER_WEIGHTS!r}",
            hint="make them of names with adapter_weights, or calibrate before GateAdapters",
        )
    return given.to(torch.float32)


def _padded_behind(ids: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens with the padding behind them, and where there are tokens."""
    if mask is None:
        return ids, torch.ones_like(ids, dtype=torch.bool)
    present = mask.to(torch.bool)
    lengths = present.sum(1)
    if bool((lengths == 0).any()):
        raise InputError("a text is nothing but padding", where="input 'attention_mask'")
    changes = (present[:, 1:] != present[:, :-1]).sum(1)
    inside = (changes > 1) & ~((changes == 2) & ~present[:, 0] & ~present[:, -1])
    if bool(inside.any()):
        raise InputError("has padding between tokens", where="input 'attention_mask'", hint="pad at an end")
    starts = present.to(torch.uint8).argmax(1)
    places = torch.arange(ids.shape[1])
    moved = ids.gather(1, (places + starts.unsqueeze(1)) % ids.shape[1])
    behind = places < lengths.unsqueeze(1)
    return torch.where(behind, moved, moved[:, :1]), behind


def without_caches(program: Program) -> None:
    """Let a decoding step give back the caches it was given, so that nothing keeps those it made. Changes the graph."""
    results = program.output.args[0]
    assert isinstance(results, tuple | list)
    program.output.args = ((results[0], *program.inputs[1 - len(results) :]),)
