"""Gated activations, the middle of a gated feed-forward block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional

from graphwright.ir.ops.definition import OpDefinition

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")


def activate(x: torch.Tensor, activation: str) -> torch.Tensor:
    """The named activation, elementwise.

    Raises:
        ValueError: the activation is not one of :data:`ACTIVATIONS`.
    """
    if activation == "silu":
        return functional.silu(x)
    if activation == "gelu":
        return functional.gelu(x)
    if activation == "gelu_tanh":
        return functional.gelu(x, approximate="tanh")
    if activation == "relu":
        return functional.relu(x)
    raise ValueError(f"activation {activation!r} is not one of {', '.join(ACTIVATIONS)}")


def gated_activation(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """``activation(gate) * up`` (Shazeer 2020, GLU variants, eq. 5 and 6).

    Args:
        gate: ``[..., d]``.
        up: ``[..., d]``, same dtype.
        activation: one of :data:`ACTIVATIONS`.

    Returns:
        ``[..., d]``.
    """
    return activate(gate, activation) * up


def _macs(arguments: Mapping[str, Any]) -> int:
    return 0


GATED_ACTIVATION = OpDefinition(
    name="gated_activation",
    schema="(Tensor gate, Tensor up, str activation) -> Tensor",
    reference=gated_activation,
    macs=_macs,
    differentiable=("gate", "up"),
)
