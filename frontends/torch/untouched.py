"""A model is traced and run in eval mode, and afterwards is exactly as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Eval mode inside the block; afterwards modes, attributes, buffers and parameters are what they were before.

    A forward may count calls, keep its last input, or update a statistic: none of that outlives the block. Buffers are
    copied for that (they are small); parameters are not: a forward that writes into those is refused.
    """
    modules = list(dict.fromkeys(model.modules()))
    attributes = [dict(vars(module)) for module in modules]
    tables = [(dict(module._parameters), dict(module._buffers), dict(module._modules)) for module in modules]
    buffers = {id(tensor): (tensor, tensor.detach().clone(), _version(tensor)) for tensor in model.buffers()}
    try:
        model.eval()
        yield
    finally:
        for tensor, copy, version in buffers.values():
            if version is None or tensor._version != version:
                with torch.no_grad():
                    tensor.copy_(copy)
        for module, saved, (parameters, own_buffers, children) in zip(modules, attributes, tables, strict=True):
            _refill(vars(module), saved)
            _refill(module._parameters, parameters)
            _refill(module._buffers, own_buffers)
            _refill(module._modules, children)


def _version(tensor: torch.Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _refill(table: dict[str, Any], saved: dict[str, Any]) -> None:
    if list(table.items()) == list(saved.items()):
        return
    table.clear()
    table.update(saved)
