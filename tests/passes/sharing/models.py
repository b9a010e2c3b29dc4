"""Small decoders and encoders whose layers are shared."""

from __future__ import annotations

import functools
from typing import Any

import torch
from tests.frontends.decoders import make

import graphwright as gw
from graphwright.ir.program import Program


def llama(layers: int = 4, **changes: Any) -> Any:
    """A random Llama of width 32."""
    return make("llama", num_hidden_layers=layers, **changes)


def step_of(layers: int = 4, **changes: Any) -> Program:
    """The same as a decoding step, with weights of its own."""
    return _step(layers, **changes).clone(copy_weights=True)


@functools.cache
def _step(layers: int, **changes: Any) -> Program:
    return gw.load_decoder(llama(layers, **changes), check=False)


def tokens(rows: int = 2, length: int = 7, seed: int = 0) -> torch.Tensor:
    """int64 ``[rows, length]``."""
    return torch.randint(0, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


def texts(rows: int = 2, length: int = 7, labels: bool = False) -> dict[str, Any]:
    """A batch as the traced model takes it."""
    ids = tokens(rows, length)
    batch: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    return {**batch, "labels": ids} if labels else batch


def traced(layers: int = 4, labels: bool = False, **changes: Any) -> Program:
    """The Llama as it is called in training, with weights of its own."""
    return _traced(layers, labels, **changes).clone(copy_weights=True)


@functools.cache
def _traced(layers: int, labels: bool, **changes: Any) -> Program:
    return gw.trace(llama(layers, **changes), texts(labels=labels))
