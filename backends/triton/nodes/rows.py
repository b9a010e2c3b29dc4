"""Norms, rotation, gated activation and softmax of a program."""

from __future__ import annotations

from typing import Any

import torch

from graphwright.backends.triton.kernels import norms, pointwise
from graphwright.backends.triton.kernels.rotary import rotary_embedding
from graphwright.backends.triton.kernels.rows import WIDEST
from graphwright.backends.triton.nodes.base import NodeKernel, Site, wants_gradient
from graphwright.ir import ops


class Norm(NodeKernel):
    """A norm; with :attr:`adds`, of the sum of its first two inputs, which it gives too."""

    adds = False


class RmsNorm(Norm):
    """``rms_norm``."""

    inputs = ("x", "weight", "eps")
    label = "rms_norm"

    def forward(self, x: torch.Tensor, *rest: Any) -> Any:
        """With gradients."""
        return norms.add_rms_norm(x, *rest) if self.adds else norms.rms_norm(x, *rest)


class LayerNorm(Norm):
    """``layer_norm`` over the last dimension."""

    inputs = ("input", "weight", "bias", "eps")
    label = "layer_norm"

    def forward(self, x: torch.Tensor, *rest: Any) -> Any:
        """With gradients."""
        return norms.add_layer_norm(x, *rest) if self.adds else norms.layer_norm(x, *rest)


class Rotary(NodeKernel):
    """``rotary_embedding``."""

    inputs = ("x", "cos", "sin", "interleaved")
    label = "rotary_embedding"

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
        """With a gradient for x; where cos or sin want one, the reference."""
        if wants_gradient(cos, sin):
            result: torch.Tensor = ops.get("rotary_embedding").target(x, cos, sin, interleaved)
            return result
        return rotary_embedding(x, cos, sin, interleaved)


class Gated(NodeKernel):
    """``gated_activation``."""

    inputs = ("gate", "up", "activation")
    label = "gated_activation"

    def forward(self, gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
        """With gradients."""
        return pointwise.gated_activation(gate, up, activation)


class Softmax(NodeKernel):
    """``softmax`` over the last dimension."""

    inputs = ("self",)
    label = "softmax (torch where gradients are wanted)"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Without gradients; torch's where they are wanted."""
        return torch.softmax(x, -1) if wants_gradient(x) else pointwise.softmax(x)


def _row_reason(site: Site, name: str) -> str | None:
    width = site.value(name).shape[-1]
    if not isinstance(width, int) or width > WIDEST:
        return f"rows are wider than {WIDEST}, or of a width that is not known"
    return site.unlike(name)


def lower_rms_norm(site: Site) -> NodeKernel | str:
    """``graphwright.rms_norm``."""
    return _row_reason(site, "x") or RmsNorm()


def lower_layer_norm(site: Site) -> NodeKernel | str:
    """``aten.layer_norm``."""
    if len(site.arguments["normalized_shape"]) != 1:
        return "it normalises over several dimensions"
    return _row_reason(site, "input") or LayerNorm()


def lower_rotary(site: Site) -> NodeKernel | str:
    """``graphwright.rotary_embedding``."""
    cos = site.value("cos").dtype
    if not cos.is_floating_point or cos == torch.float64:
        return "cosines are of another dtype than the kernels read"
    return site.unlike("x") or Rotary()


def lower_gated(site: Site) -> NodeKernel | str:
    """``graphwright.gated_activation``."""
    return site.unlike("gate", "up") or Gated()


def lower_softmax(site: Site) -> NodeKernel | str:
    """``aten.softmax.int``."""
    value = site.value("self")
    if site.arguments["dim"] not in (-1, value.dim() - 1) or value.dim() == 0:
        return "it is not over the last dimension"
    if site.arguments["dtype"] not in (None, value.dtype):
        return "its result is of another dtype"
    return _row_reason(site, "self") or Softmax()
