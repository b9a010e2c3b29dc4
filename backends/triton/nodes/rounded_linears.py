"""Linears of a program whose activations are rounded to 8 bits as they come: INT8 and FP8."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch

from graphwright.backends.triton.kernels.epilogue import Epilogue
from graphwright.backends.triton.kernels.linear_fp8 import OLDEST as OLDEST_FP8
from graphwright.backends.triton.kernels.linear_fp8 import linear_fp8
from graphwright.backends.triton.kernels.linear_int8 import Codes, multiply_codes, round_rows, sums_of
from graphwright.backends.triton.kernels.rows import WIDEST
from graphwright.backends.triton.launching import apply
from graphwright.backends.triton.nodes.base import LinearKernel, NodeKernel, Site
from graphwright.backends.triton.status import architecture
from graphwright.ir.ops.quantization import quantize_activations, unpack


class RoundedLinear(LinearKernel):
    """A linear whose input's gradient is that of ``x Ŵᵀ``: straight through the rounding (Bengio et al. 2013)."""

    def with_gradients(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """By the kernel; the gradient is torch's product with the weight in x's dtype, made for the moment."""
        result: torch.Tensor = apply(_StraightThrough, x, bias, self)
        return result

    @abstractmethod
    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight that the codes stand for, ``[out, in]``."""

    def slope(self, x: torch.Tensor) -> torch.Tensor | None:
        """The derivative of the rounded input, of x's shape or ``[in]``; ``None`` for 1."""
        return None


class _StraightThrough(torch.autograd.Function):
    """A rounded linear with the gradients of input and bias."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: torch.Tensor | None, linear: RoundedLinear) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.linear = linear
        return linear.fused(x, Epilogue(bias))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,), (x,) = grads, ctx.saved_tensors
        of_x = of_bias = None
        if ctx.needs_input_grad[0]:
            slope = ctx.linear.slope(x)
            of_x = grad @ ctx.linear.dense(grad.dtype)
            of_x = of_x if slope is None else (of_x * slope).to(x.dtype)
        if ctx.needs_input_grad[1]:
            of_bias = grad.flatten(0, -2).sum(0)
        return of_x, of_bias, None


class Int8Linear(RoundedLinear):
    """8-bit weights and activations; how these are rounded is the subclass's."""

    def __init__(self, weight: torch.Tensor, scales: torch.Tensor, label: str) -> None:
        super().__init__()
        self.weight, self.scales, self.label = weight.contiguous(), scales.float().contiguous(), label
        self.sums = sums_of(weight)

    @abstractmethod
    def round(self, x: torch.Tensor) -> Codes:
        """Codes of the activations."""

    def fused(self, x: torch.Tensor, epilogue: Epilogue) -> torch.Tensor:
        """Round, multiply, finish."""
        result = multiply_codes(self.round(x), self.weight, self.scales, self.sums, epilogue, x.dtype)
        return result.view(*x.shape[:-1], result.shape[-1])

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """Codes times scales."""
        return _scaled(self.weight, self.scales, dtype)


def _scaled(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``[out, in]`` codes times scales ``[out]`` or ``[out, G]``."""
    groups = scales.view(len(scales), -1)
    values: torch.Tensor = codes.to(dtype).unflatten(1, (groups.shape[1], -1)) * groups.to(dtype).unsqueeze(-1)
    return values.flatten(1)


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

    def slope(self, x: torch.Tensor) -> torch.Tensor:
        """0 beyond the grid."""
        codes = x / self.steps + self.zero_point
        return ((codes >= 0) & (codes <= 255)) / self.steps


class PerGroup(Int8Linear):
    """A range for each row and group of columns."""

    group_size: int

    def round(self, x: torch.Tensor) -> Codes:
        """Of each group by itself."""
        return round_rows(x, group_size=self.group_size)


class Fp8Linear(RoundedLinear):
    """E4M3 weights and activations."""

    def __init__(self, weight: torch.Tensor, scales: torch.Tensor, label: str, *, per_group: bool) -> None:
        super().__init__()
        self.weight, self.scales, self.label = weight, scales.float().contiguous(), label
        self.per_group = per_group

    def fused(self, x: torch.Tensor, epilogue: Epilogue) -> torch.Tensor:
        """Round, multiply, finish."""
        return linear_fp8(x, self.weight, self.scales, epilogue, per_group=self.per_group)

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """Numbers times scales."""
        return _scaled(self.weight, self.scales, dtype)


def _reason(site: Site, *names: str) -> str | None:
    if not all(site.is_stored(name) for name in names):
        return "its weight is computed"
    if int(site.value("x").shape[-1]) > WIDEST:
        return f"rows are wider than {WIDEST}"
    return site.unlike("x")


def lower_int8_dynamic(site: Site) -> NodeKernel | str:
    """``graphwright.linear_int8_dynamic``."""
    if (reason := _reason(site, "qweight", "scales")) is not None:
        return reason
    kind = site.arguments["activation"]
    made = PerToken if kind == "per_token" else PerTensor
    return made(site.stored("qweight"), site.stored("scales"), f"linear_int8 W8A8 {kind}")


def lower_int8_static(site: Site) -> NodeKernel | str:
    """``graphwright.linear_int8_static``."""
    if (reason := _reason(site, "qweight", "scales", "input_scales")) is not None:
        return reason
    made = Static(site.stored("qweight"), site.stored("scales"), "linear_int8 W8A8 static")
    made.steps = site.stored("input_scales").float().contiguous()
    made.zero_point = site.arguments["input_zero_point"]
    return made


def lower_nbits_dynamic(site: Site) -> NodeKernel | str:
    """``graphwright.linear_nbits_dynamic``."""
    given = site.arguments
    if (reason := _reason(site, "qweight", "scales", "zero_points")) is not None:
        return reason
    if (given["bits"], given["activation_bits"], given["activation"]) != (8, 8, "per_group"):
        return "the kernel takes 8-bit weights and 8-bit activations with ranges for groups"
    size, columns = given["group_size"], int(site.value("x").shape[-1])
    if given["zero_points"] is not None or size % 32 or columns % size:
        return "the kernel takes symmetric groups of a multiple of 32 columns that divide the input"
    codes = unpack(site.stored("qweight"), 8).flatten(1).to(torch.int16) - 128
    made = PerGroup(codes.to(torch.int8), site.stored("scales"), f"linear_int8 W8A8 per_group {size}")
    made.group_size = size
    return made


def lower_fp8_dynamic(site: Site) -> NodeKernel | str:
    """``graphwright.linear_fp8_dynamic``."""
    if (reason := _reason(site, "qweight", "scales")) is not None:
        return reason
    arch = architecture(site.device)
    if arch < OLDEST_FP8:
        need = f"{OLDEST_FP8 / 10:.1f}"
        return f"FP8 products need compute capability {need}, this GPU has {arch / 10:.1f}; INT8 activations work there"
    codes, columns, size = site.stored("qweight"), int(site.value("x").shape[-1]), site.arguments["group_size"]
    if codes.shape[1] > 1 and (size % 32 or columns % size):
        return "the kernel takes groups of a multiple of 32 columns that divide the input, or whole rows"
    weight = codes.flatten(1)[:, :columns].contiguous().view(torch.float8_e4m3fn)
    kind = f"{site.arguments['activation']}{f', groups of {size}' * (codes.shape[1] > 1)}"
    per_group = site.arguments["activation"] == "per_group"
    return Fp8Linear(weight, site.stored("scales"), f"linear_fp8 W8A8 {kind}", per_group=per_group)
