"""``trace_decoder``: a causal language model as one graph of a step with a cache of keys and values."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from graphwright.frontends.torch.tracing import trace
from graphwright.ir import ops
from graphwright.ir.program import Program

_NAME = "graphwright_step"


@dataclass
class _Step:
    """What the attention of the step that is running reads, and the caches it leaves behind."""

    slots: torch.Tensor
    starts: torch.Tensor
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    done: set[int] = field(default_factory=set)


_step: ContextVar[_Step] = ContextVar("step")


class StepModel(nn.Module):
    """A causal language model called one step at a time.

    Inputs: ``input_ids`` int64 ``[B, S]``; ``slots`` and ``starts`` int64 ``[B]``; ``rows`` int64 ``[B, K]``, the
    tokens whose logits are wanted; ``keys`` and ``values``, for each layer ``[N, Hkv, C, D]``. Outputs: logits
    ``[B, K, V]``, and keys and values as they are after the step.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: torch.Tensor,
        slots: torch.Tensor,
        starts: torch.Tensor,
        rows: torch.Tensor,
        keys: list[torch.Tensor],
        values: list[torch.Tensor],
    ) -> dict[str, Any]:
        step = _Step(slots, starts, list(keys), list(values))
        select = ops.get("select_rows").target
        head = self.model.get_output_embeddings()
        hook = head.register_forward_pre_hook(lambda _, given: (select(given[0], rows), *given[1:]))
        token = _step.set(step)
        try:
            position_ids = starts.unsqueeze(1) + torch.arange(input_ids.shape[1], device=input_ids.device)
            result = self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False, return_dict=True)
        finally:
            _step.reset(token)
            hook.remove()
        return {"logits": result.logits, "keys": step.keys, "values": step.values}


def trace_decoder(model: Any) -> Program:
    """A step graph of a transformers causal language model; called like :class:`StepModel`."""
    keys, values = _caches(model)
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    example = {
        "input_ids": torch.randint(0, vocabulary, (2, 5), generator=generator),
        "slots": torch.tensor([2, 0]),
        "starts": torch.tensor([3, 1]),
        "rows": torch.tensor([[0, 2, 4], [1, 3, 4]]),
        "keys": keys,
        "values": values,
    }
    dynamic: dict[str, dict[int, str]] = {
        "input_ids": {0: "batch", 1: "tokens"},
        "slots": {0: "batch"},
        "starts": {0: "batch"},
        "rows": {0: "batch", 1: "selected"},
    }
    for layer in range(len(keys)):
        dynamic[f"keys.{layer}"] = dynamic[f"values.{layer}"] = {0: "slots", 2: "capacity"}
    with _own_attention(model):
        return trace(StepModel(model), example, dynamic=dynamic)


def _caches(model: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Caches for examples: four slots of eleven positions."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    generator = torch.Generator().manual_seed(1)
    made = [
        [torch.randn(4, heads, 11, width, generator=generator).to(model.dtype) for _ in range(config.num_hidden_layers)]
        for _ in range(2)
    ]
    return made[0], made[1]


@contextlib.contextmanager
def _own_attention(model: Any) -> Iterator[None]:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(_NAME, _attend)
    AttentionMaskInterface.register(_NAME, lambda *args, **kwargs: None)
    before = model.config._attn_implementation
    model.config._attn_implementation = _NAME
    try:
        yield
    finally:
        model.config._attn_implementation = before


def _attend(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **options: Any
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: heads come as ``[B, H, S, D]`` and go as ``[B, S, H, D]``."""
    step, layer = _step.get(), module.layer_idx
    append, attend = ops.get("cache_append").target, ops.get("cached_attention").target
    step.keys[layer] = append(step.keys[layer], key, step.slots, step.starts)
    step.values[layer] = append(step.values[layer], value, step.slots, step.starts)
    scale = options.get("scaling") or query.shape[-1] ** -0.5
    window = options.get("sliding_window") or 0
    softcap = float(options.get("softcap") or 0.0)
    cache = step.keys[layer], step.values[layer], step.slots, step.starts
    return attend(query, *cache, None, float(scale), int(window), softcap).transpose(1, 2), None
