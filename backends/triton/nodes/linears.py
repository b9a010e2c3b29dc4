"""Linears of a program: packed weights, 8-bit activations, Kronecker products."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch

from graphwright.backends.triton.kernels.epilogue import Epilogue
from graphwright.backends.triton.kernels.kron_linear import kron_linear
from graphwright.backends.triton.kernels.linear_int8 import Codes, multiply_codes, round_rows, sums_of
from graphwright.backends.triton.kernels.linear_nbits import FEW_ROWS, fused_linear_nbits, linear_nbits
from graphwright.backends.triton.kernels.nbits_weight import NbitsWeight, refusal, repack
from graphwright.backends.triton.kernels.rows import WIDEST
from graphwright.backends.triton.nodes.base import LinearKernel, NodeKernel, Site, wants_gradient
from graphwright.ir.ops.activation import ACTIVATIONS, activate
from graphwright.ir.ops.quantization import quantize_activations, unpack


def epilogue_in_torch(
    y: torch.Tensor, activation: str, factor: torch.Tensor | None, residual: torch.Tensor | None
) -> torch.Tensor:
    """``activation(y) * factor + residual`` with gradients."""
    if activation == "tanh":
        y = torch.tanh(y)
    elif activation in ACTIVATIONS:
        y = activate(y, activation)
    y = y if factor is None else y * factor
    return y if residual is None else y + residual


class NbitsLinear(LinearKernel):
    """``linear_nbits`` with what follows it."""

    def __init__(self, weight: NbitsWeight, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias
        self.label = f"linear_nbits W{weight.bits} (split-K up to {FEW_ROWS} rows, else tiles)"

    def forward(
        self, x: torch.Tensor, factor: torch.Tensor | None = None, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The product, in one kernel where no gradient is wanted."""
        if wants_gradient(x, factor, residual):
            return epilogue_in_torch(linear_nbits(x, self.weight, self.bias), self.activation, factor, residual)
        return fused_linear_nbits(x, self.weight, Epilogue(self.bias, self.activation, factor, residual))


class Int8Linear(LinearKernel, ABC):
    """8-bit weights and activations; how these are rounded is the subclass's."""

    def __init__(
        self, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, label: str, site: Site
    ) -> None:
        super().__init__()
        self.weight, self.scales, self.bias = weight.contiguous(), scales.float().contiguous(), bias
        self.sums = sums_of(weight)
        self.label = f"{label} (the reference where gradients are wanted)"
        arguments = site.arguments
        self._operator: Any = site.node.target
        self._given = [site.maybe_stored(name) if site.is_stored(name) else arguments[name] for name in arguments][1:]

    @abstractmethod
    def round(self, x: torch.Tensor) -> Codes:
        """Codes of the activations."""

    def forward(
        self, x: torch.Tensor, factor: torch.Tensor | None = None, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Round, multiply, finish."""
        if wants_gradient(x, factor, residual):
            y: torch.Tensor = self._operator(x, *self._given)
            return epilogue_in_torch(y, self.activation, factor, residual)
        epilogue = Epilogue(self.bias, self.activation, factor, residual)
        result = multiply_codes(self.round(x), self.weight, self.scales, self.sums, epilogue, x.dtype)
        return result.view(*x.shape[:-1], result.shape[-1])


class PerToken(Int8Linear):
    """A range for each row."""

    def round(self, x: torch.Tensor) -> Codes:
        """Of each row by itself."""
        return round_rows(x)


class PerTensor(Int8Linear):
    """One range for all rows: its scale is found by torch, before the kernel."""

    def round(self, x: torch.Tensor) -> Codes:
        """Of all rows together."""
        codes, scale, zero = quantize_activations(x.to(torch.float32), "per_tensor")
        rows = codes.shape[:-1].numel()
        shifted = torch.where(torch.isfinite(scale), codes - 128, 0).to(torch.int8).reshape(rows, x.shape[-1])
        whole = torch.where(torch.isfinite(scale), zero - 128, 0)
        return Codes(shifted.contiguous(), scale.expand(rows).contiguous(), whole.expand(rows).contiguous())


class Static(Int8Linear):
    """A grid known beforehand."""

    steps: torch.Tensor
    zero_point: int

    def round(self, x: torch.Tensor) -> Codes:
        """On the grid."""
        return round_rows(x, steps=self.steps, zero_point=self.zero_point)


class PerGroup(Int8Linear):
    """A range for each row and group of columns."""

    group_size: int

    def round(self, x: torch.Tensor) -> Codes:
        """Of each group by itself."""
        return round_rows(x, group_size=self.group_size)


class KronLinear(NodeKernel):
    """``kron_linear``."""

    inputs = ("x", "a", "b", "scale")
    label = "kron_linear"

    def forward(self, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
        """The product, with gradients."""
        return kron_linear(x, a, b, scale)


def lower_nbits(site: Site) -> NodeKernel | str:
    """``graphwright.linear_nbits``."""
    given = site.arguments
    if not all(site.is_stored(name) for name in ("qweight", "scales", "zero_points", "bias")):
        return "its weight is computed"
    if (reason := site.unlike("x")) is not None:
        return reason
    zeros = site.maybe_stored("zero_points")
    if (reason := refusal(given["bits"], given["group_size"], zeros)) is not None:
        return reason
    columns = int(site.value("x").shape[-1])
    weight = repack(site.stored("qweight"), site.stored("scales"), zeros, given["bits"], given["group_size"], columns)
    return NbitsLinear(weight, site.maybe_stored("bias"))


def _int8_reason(site: Site, *names: str) -> str | None:
    if not all(site.is_stored(name) for name in names):
        return "its weight is computed"
    if int(site.value("x").shape[-1]) > WIDEST:
        return f"rows are wider than {WIDEST}"
    return site.unlike("x")


def lower_int8_dynamic(site: Site) -> NodeKernel | str:
    """``graphwright.linear_int8_dynamic``."""
    if (reason := _int8_reason(site, "qweight", "scales", "bias")) is not None:
        return reason
    kind = site.arguments["activation"]
    made = PerToken if kind == "per_token" else PerTensor
    stored = site.stored("qweight"), site.stored("scales"), site.maybe_stored("bias")
    return made(*stored, f"linear_int8 W8A8 {kind}", site)


def lower_int8_static(site: Site) -> NodeKernel | str:
    """``graphwright.linear_int8_static``."""
    if (reason := _int8_reason(site, "qweight", "scales", "bias", "input_scales")) is not None:
        return reason
    stored = site.stored("qweight"), site.stored("scales"), site.maybe_stored("bias")
    made = Static(*stored, "linear_int8 W8A8 static", site)
    made.steps = site.stored("input_scales").float().contiguous()
    made.zero_point = site.arguments["input_zero_point"]
    return made


def lower_nbits_dynamic(site: Site) -> NodeKernel | str:
    """``graphwright.linear_nbits_dynamic``."""
    given = site.arguments
    if (reason := _int8_reason(site, "qweight", "scales", "zero_points", "bias")) is not None:
        return reason
    if (given["bits"], given["activation_bits"], given["activation"]) != (8, 8, "per_group"):
        return "the kernel takes 8-bit weights and 8-bit activations with ranges for groups"
    size, columns = given["group_size"], int(site.value("x").shape[-1])
    if given["zero_points"] is not None or size not in (32, 64, 128) or columns % size or columns == size:
        return "the kernel takes symmetric groups of 32, 64 or 128 columns that divide the input, and more than one"
    codes = unpack(site.stored("qweight"), 8).flatten(1).to(torch.int16) - 128
    stored = codes.to(torch.int8), site.stored("scales"), site.maybe_stored("bias")
    made = PerGroup(*stored, "linear_int8 W8A8 per_group", site)
    made.group_size = size
    return made


def lower_kron(site: Site) -> NodeKernel | str:
    """``graphwright.kron_linear``."""
    return site.unlike("x", "a", "b") or KronLinear()
