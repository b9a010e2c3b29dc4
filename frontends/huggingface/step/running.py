"""A transformers model that is called one decoding step at a time."""

from __future__ import annotations

import contextlib
import copy
import inspect
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from graphwright.frontends.huggingface.step.attention import RUNNING, Step, attend, make_mask
from graphwright.frontends.huggingface.step.families import FAMILIES, Family
from graphwright.ir import ops
from graphwright.ir.errors import TraceError

_NAME = "graphwright_step"
_SLOPES = "alibi_slopes"


def step_model(model: Any, family: Family | None) -> nn.Module:
    """The same model with another forward.

    Its inputs: ``input_ids`` int64 ``[B, S]``; ``slots`` and ``starts`` int64 ``[B]``; ``rows`` int64 ``[B, K]``, the
    tokens whose logits are wanted; ``keys`` and ``values``, for each layer ``[N, Hkv, C, D]``. Its outputs: logits
    ``[B, K, V]``, and keys and values as they are after the step. It shares modules, and so all their names, with the
    model; ALiBi's slopes are one more buffer.
    """
    shell = copy.copy(model)
    slopes = None if family is None else family.slopes(model)
    vars(shell)["_buffers"] = dict(model._buffers)
    if slopes is not None:
        shell.register_buffer(_SLOPES, slopes.to(torch.float32), persistent=False)

    def forward(
        input_ids: torch.Tensor,
        slots: torch.Tensor,
        starts: torch.Tensor,
        rows: torch.Tensor,
        keys: list[torch.Tensor],
        values: list[torch.Tensor],
    ) -> dict[str, Any]:
        step = Step(slots, starts, dict(enumerate(keys)), dict(enumerate(values)), getattr(shell, _SLOPES, None))
        logits = run_step(model, step, input_ids, rows)
        return {"logits": logits, "keys": list(step.keys.values()), "values": list(step.values.values())}

    vars(shell)["forward"] = forward
    module: nn.Module = shell
    return module


def run_step(model: Any, step: Step, input_ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Logits ``[B, K, V]`` of one step, inside :func:`own_attention`; the step holds the caches afterwards."""
    select = ops.get("select_rows").target
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, given: (select(given[0], rows), *given[1:]))
    token = RUNNING.set(step)
    try:
        positions = step.starts.unsqueeze(1) + torch.arange(input_ids.shape[1], device=input_ids.device)
        takes = "position_ids" in inspect.signature(model.forward).parameters
        given = {"position_ids": positions} if takes else {}
        result = model.forward(input_ids=input_ids, use_cache=False, return_dict=True, **given)
    finally:
        RUNNING.reset(token)
        hook.remove()
    logits: torch.Tensor = result.logits
    if logits.shape[:2] != rows.shape:
        raise TraceError("does not compute its logits with its language modelling head", where=type(model).__name__)
    return logits


@contextlib.contextmanager
def own_attention(model: Any, family: Family | None) -> Iterator[None]:
    """Inside the block, the model's attention runs over the caches of the step that is running."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(_NAME, attend)
    AttentionMaskInterface.register(_NAME, make_mask)
    modules = list(model.modules())
    configs = {id(config): config for module in modules if (config := getattr(module, "config", None)) is not None}
    before = [(config, config._attn_implementation) for config in configs.values()]
    replaced = [module for module in modules if type(module).__name__ in FAMILIES]
    forwards = [vars(module).get("forward") for module in replaced]
    try:
        for config, _ in before:
            config._attn_implementation = _NAME
        for module in replaced:
            assert family is not None
            vars(module)["forward"] = types.MethodType(family.forward, module)
        yield
    finally:
        for config, name in before:
            config._attn_implementation = name
        for module, forward in zip(replaced, forwards, strict=True):
            del vars(module)["forward"]
            if forward is not None:
                vars(module)["forward"] = forward
