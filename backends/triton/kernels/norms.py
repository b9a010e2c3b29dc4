"""Layer and RMS norms over rows, with the sum before them, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl

from graphwright.backends.triton.kernels.rows import as_rows, row_config
from graphwright.backends.triton.launching import apply, blocks_of, kernel, launch

# Programs that share the rows of a backward pass, each with a sum of its own for the weight's gradient.
_SHARES = 256


@kernel
def _norm(
    x: tl.tensor,
    residual: tl.tensor,
    total: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    means: tl.tensor,
    factors: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    x_stride: tl.tensor,
    residual_stride: tl.tensor,
    eps: tl.tensor,
    CENTER: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    at = row.to(tl.int64)[:, None]
    value = tl.load(x + at * x_stride + column[None, :], inside, 0.0).to(tl.float32)
    if residual is not None:
        value += tl.load(residual + at * residual_stride + column[None, :], inside, 0.0).to(tl.float32)
        # The norm takes the sum as it is stored.
        value = value.to(total.dtype.element_ty)
        tl.store(total + at * columns + column[None, :], value, inside)
        value = value.to(tl.float32)
    if CENTER:
        mean = tl.sum(value, 1) / columns
        value = tl.where(inside, value - mean[:, None], 0.0)
        tl.store(means + row, mean, row < rows)
    factor = 1.0 / tl.sqrt(tl.sum(value * value, 1) / columns + eps)
    tl.store(factors + row, factor, row < rows)
    value *= factor[:, None]
    if weight is not None:
        value *= tl.load(weight + column, column < columns, 0.0).to(tl.float32)[None, :]
    if bias is not None:
        value += tl.load(bias + column, column < columns, 0.0).to(tl.float32)[None, :]
    tl.store(y + at * columns + column[None, :], value.to(y.dtype.element_ty), inside)


@kernel
def _norm_backward(
    x: tl.tensor,
    weight: tl.tensor,
    grad: tl.tensor,
    extra: tl.tensor,
    means: tl.tensor,
    factors: tl.tensor,
    grad_x: tl.tensor,
    weight_sums: tl.tensor,
    bias_sums: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    x_stride: tl.tensor,
    steps: tl.tensor,
    CENTER: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    column = tl.arange(0, BLOCK)
    within = column < columns
    weight_sum = tl.zeros((BLOCK,), tl.float32)
    bias_sum = tl.zeros((BLOCK,), tl.float32)
    scale = tl.zeros((BLOCK,), tl.float32) + 1.0
    if weight is not None:
        scale = tl.load(weight + column, within, 0.0).to(tl.float32)
    for step in range(steps):
        row = (step * tl.num_programs(0) + tl.program_id(0)) * ROWS + tl.arange(0, ROWS)
        there = row < rows
        inside = there[:, None] & within[None, :]
        at = row.to(tl.int64)[:, None]
        value = tl.load(x + at * x_stride + column[None, :], inside, 0.0).to(tl.float32)
        slope = tl.load(grad + at * columns + column[None, :], inside, 0.0).to(tl.float32)
        factor = tl.load(factors + row, there, 0.0)
        if CENTER:
            value = tl.where(inside, value - tl.load(means + row, there, 0.0)[:, None], 0.0)
        value *= factor[:, None]
        weight_sum += tl.sum(slope * value, 0)
        bias_sum += tl.sum(slope, 0)
        slope *= scale[None, :]
        along = tl.sum(slope * value, 1) / columns
        result = slope - value * along[:, None]
        if CENTER:
            result -= (tl.sum(slope, 1) / columns)[:, None]
        result *= factor[:, None]
        if extra is not None:
            result += tl.load(extra + at * columns + column[None, :], inside, 0.0).to(tl.float32)
        tl.store(grad_x + at * columns + column[None, :], result.to(grad_x.dtype.element_ty), inside)
    if weight_sums is not None:
        tl.store(weight_sums + tl.program_id(0) * columns + column, weight_sum, within)
    if bias_sums is not None:
        tl.store(bias_sums + tl.program_id(0) * columns + column, bias_sum, within)


class _Norm(torch.autograd.Function):
    """The norm of ``x + residual``, and that sum."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        eps: float,
        center: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        given, added = as_rows(x), None if residual is None else as_rows(residual)
        rows, columns = given.shape
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        total = None if residual is None else torch.empty_like(y)
        factors = torch.empty(rows, dtype=torch.float32, device=x.device)
        means = torch.empty_like(factors) if center else None
        config = row_config(columns)
        launch(
            _norm,
            (blocks_of(rows, config.blocks["ROWS"]),),
            config,
            x=given,
            residual=added,
            total=total,
            weight=weight,
            bias=bias,
            y=y,
            means=means,
            factors=factors,
            rows=rows,
            columns=columns,
            x_stride=given.stride(0),
            residual_stride=0 if added is None else added.stride(0),
            eps=float(eps),
            CENTER=center,
        )
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(given if total is None else as_rows(total), weight, bias, means, factors)
            ctx.center = center
        return y, total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        x, weight, bias, means, factors = ctx.saved_tensors
        slope, extra = (None if grad is None else grad.contiguous() for grad in grads)
        shape = next(grad.shape for grad in grads if grad is not None)
        if slope is None:
            slope = torch.zeros(shape, dtype=x.dtype, device=x.device)
        rows, columns = x.shape
        config = row_config(columns)
        blocks = blocks_of(rows, config.blocks["ROWS"])
        programs = min(blocks, _SHARES)
        grad_x = torch.empty(shape, dtype=x.dtype, device=x.device)
        sums = [
            None
            if value is None or not needed
            else torch.empty(programs, columns, dtype=torch.float32, device=x.device)
            for value, needed in ((weight, ctx.needs_input_grad[2]), (bias, ctx.needs_input_grad[3]))
        ]
        launch(
            _norm_backward,
            (programs,),
            config,
            x=x,
            weight=weight,
            grad=slope,
            extra=extra,
            means=means,
            factors=factors,
            grad_x=grad_x,
            weight_sums=sums[0],
            bias_sums=sums[1],
            rows=rows,
            columns=columns,
            x_stride=x.stride(0),
            steps=blocks_of(blocks, programs) if programs else 0,
            CENTER=ctx.center,
        )
        of_weight, of_bias = (
            None if total is None else total.sum(0).to(value.dtype) for total, value in zip(sums, (weight, bias))
        )
        residual = grad_x if ctx.needs_input_grad[1] else None
        return grad_x, residual, of_weight, of_bias, None, None


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """``x / sqrt(mean(x²) + eps) * weight`` in float32; see :func:`graphwright.ir.ops.normalization.rms_norm`.

    Gradients flow to ``x`` and ``weight``: with ``x̂ = x r`` and ``g = w dy``, ``dx = r (g - x̂ mean(g x̂))``.

    Args:
        x: ``[..., d]``, float16, bfloat16 or float32, of any strides.
        weight: ``[d]`` or ``None``.
        eps: added to the mean square.
    """
    result: torch.Tensor = apply(_Norm, x, None, weight, None, eps, False)[0]
    return result


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``rms_norm(x + residual)`` and the sum, which is rounded to x's dtype before the norm takes it."""
    y, total = apply(_Norm, x, residual, weight, None, eps, False)
    return y, total


def layer_norm(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """``(x - mean) / sqrt(var + eps) * weight + bias`` in float32 (Ba et al. 2016, eq. 3), over the last dimension.

    With ``x̂`` the normalised row and ``g = w dy``, ``dx = r (g - mean(g) - x̂ mean(g x̂))``. Arguments as for
    :func:`rms_norm`.
    """
    result: torch.Tensor = apply(_Norm, x, None, weight, bias, eps, True)[0]
    return result


def add_layer_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``layer_norm(x + residual)`` and the sum, see :func:`add_rms_norm`."""
    y, total = apply(_Norm, x, residual, weight, bias, eps, True)
    return y, total
