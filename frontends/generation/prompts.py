"""Prompts in any of their forms, as lists of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from graphwright.ir.errors import InputError

Prompts = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]] | torch.Tensor


def read_prompts(prompts: Prompts, attention_mask: torch.Tensor | None, tokenizer: Any) -> list[list[int]]:
    """Tokens of each prompt.

    Args:
        prompts: a string or several, the tokens of one prompt or of several, or int ``[B, S]`` or ``[S]``.
        attention_mask: for a tensor, ``[B, S]``: 0 where there is padding, on either side.
        tokenizer: for strings; it adds the special tokens that it puts at the beginning.

    Raises:
        InputError: the prompts are of another form, or strings without a tokenizer.
    """
    if isinstance(prompts, torch.Tensor):
        return _of_tensor(prompts, attention_mask)
    if attention_mask is not None:
        raise InputError("is for prompts that are a tensor", where="argument 'attention_mask'")
    given: list[Any] = [prompts] if isinstance(prompts, str) else _listed(prompts)
    if not given:
        raise InputError("there is no prompt", where="argument 'prompts'")
    if all(_is_token(each) for each in given):
        given = [given]
    return [_tokens_of(each, tokenizer, number) for number, each in enumerate(given, 1)]


def check_prompts(prompts: Sequence[Sequence[int]], vocabulary: int, room: int) -> None:
    """Check tokens and lengths before anything runs.

    Raises:
        InputError: a prompt is empty, holds an unknown token, or leaves no room for an answer.
    """
    for number, tokens in enumerate(prompts, 1):
        where = f"prompt {number}"
        if not tokens:
            raise InputError("is empty", where=where, hint="give at least one token, such as the one texts begin with")
        unknown = next((token for token in tokens if not 0 <= token < vocabulary), None)
        if unknown is not None:
            raise InputError(
                f"holds the token {unknown}, the vocabulary has {vocabulary}",
                where=where,
                hint="the tokenizer belongs to another model",
            )
        if len(tokens) >= room:
            raise InputError(
                f"has {len(tokens)} tokens; {room} is all that prompt and answer may have",
                where=where,
                hint="shorten it, or make a cache of more capacity if the model's context is longer than that",
            )


def _listed(prompts: Any) -> list[Any]:
    if isinstance(prompts, list | tuple):
        return list(prompts)
    raise InputError(
        f"cannot be a {type(prompts).__name__}",
        where="argument 'prompts'",
        hint="give a string, several strings, lists of tokens, or a tensor of tokens",
    )


def _tokens_of(prompt: Any, tokenizer: Any, number: int) -> list[int]:
    if isinstance(prompt, str):
        if tokenizer is None:
            raise InputError(
                "is a string, and there is no tokenizer",
                where=f"prompt {number}",
                hint="give tokenizer=, or load the model from a folder that holds one",
            )
        return [int(token) for token in tokenizer.encode(prompt)]
    if isinstance(prompt, torch.Tensor) and prompt.dim() == 1 and not prompt.is_floating_point():
        return [int(token) for token in prompt.tolist()]
    if isinstance(prompt, list | tuple) and all(_is_token(token) for token in prompt):
        return [int(token) for token in prompt]
    raise InputError("is neither a string nor a list of tokens", where=f"prompt {number}")


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _of_tensor(prompts: torch.Tensor, mask: torch.Tensor | None) -> list[list[int]]:
    if prompts.dim() not in (1, 2) or prompts.is_floating_point() or prompts.dtype == torch.bool:
        raise InputError(
            f"is {prompts.dtype} {list(prompts.shape)}", where="argument 'prompts'", hint="give integers [B, S] or [S]"
        )
    rows = prompts if prompts.dim() == 2 else prompts.unsqueeze(0)
    if mask is None:
        return [[int(token) for token in row] for row in rows.tolist()]
    kept = mask if mask.dim() == 2 else mask.unsqueeze(0)
    if kept.shape != rows.shape:
        raise InputError(f"is {list(mask.shape)} for tokens {list(prompts.shape)}", where="argument 'attention_mask'")
    found = []
    for number, (row, keep) in enumerate(zip(rows.tolist(), kept.bool().tolist(), strict=True), 1):
        ends = [index for index, is_kept in enumerate(keep) if is_kept]
        if ends and not all(keep[ends[0] : ends[-1] + 1]):
            raise InputError("has gaps", where=f"attention_mask of prompt {number}", hint="padding stands at the ends")
        found.append([int(token) for token in row[ends[0] : ends[-1] + 1]] if ends else [])
    return found
