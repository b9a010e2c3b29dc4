"""Gated activation, forward and backward, and softmax over rows."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl

from graphwright.backends.triton.configurations import Config
from graphwright.backends.triton.kernels.products import activate, slope
from graphwright.backends.triton.kernels.rows import as_rows, row_config
from graphwright.backends.triton.launching import apply, blocks_of, kernel, launch

_BLOCK = 1024


@kernel
def _gated(
    gate: tl.tensor,
    up: tl.tensor,
    y: tl.tensor,
    columns: tl.tensor,
    gate_stride: tl.tensor,
    up_stride: tl.tensor,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    a = tl.load(gate + row * gate_stride + column, inside, 0.0).to(tl.float32)
    b = tl.load(up + row * up_stride + column, inside, 0.0).to(tl.float32)
    tl.store(y + row * columns + column, (activate(a, ACTIVATION) * b).to(y.dtype.element_ty), inside)


@kernel
def _gated_backward(
    gate: tl.tensor,
    up: tl.tensor,
    grad: tl.tensor,
    of_gate: tl.tensor,
    of_up: tl.tensor,
    columns: tl.tensor,
    gate_stride: tl.tensor,
    up_stride: tl.tensor,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    a = tl.load(gate + row * gate_stride + column, inside, 0.0).to(tl.float32)
    b = tl.load(up + row * up_stride + column, inside, 0.0).to(tl.float32)
    g = tl.load(grad + row * columns + column, inside, 0.0).to(tl.float32)
    tl.store(of_gate + row * columns + column, (g * b * slope(a, ACTIVATION)).to(of_gate.dtype.element_ty), inside)
    tl.store(of_up + row * columns + column, (g * activate(a, ACTIVATION)).to(of_up.dtype.element_ty), inside)


@kernel
def _softmax(
    x: tl.tensor,
    y: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    x_stride: tl.tensor,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    at = row.to(tl.int64)[:, None]
    value = tl.load(x + at * x_stride + column[None, :], inside, float("-inf")).to(tl.float32)
    power = tl.exp(value - tl.max(value, 1)[:, None])
    power = power / tl.sum(power, 1)[:, None]
    tl.store(y + at * columns + column[None, :], power.to(y.dtype.element_ty), inside)


class _Gated(torch.autograd.Function):
    """``activation(gate) * up`` with the gradients of both."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        a, b = as_rows(gate), as_rows(up)
        launch(
            _gated,
            (a.shape[0], blocks_of(a.shape[1], _BLOCK)),
            Config({"BLOCK": _BLOCK}, 4, 1),
            gate=a,
            up=b,
            y=y,
            columns=a.shape[1],
            gate_stride=a.stride(0),
            up_stride=b.stride(0),
            ACTIVATION=activation,
        )
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        a, b, grad = as_rows(gate), as_rows(up), as_rows(grads[0]).contiguous()
        of_gate, of_up = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
        launch(
            _gated_backward,
            (a.shape[0], blocks_of(a.shape[1], _BLOCK)),
            Config({"BLOCK": _BLOCK}, 4, 1),
            gate=a,
            up=b,
            grad=grad,
            of_gate=of_gate,
            of_up=of_up,
            columns=a.shape[1],
            gate_stride=a.stride(0),
            up_stride=b.stride(0),
            ACTIVATION=ctx.activation,
        )
        return of_gate, of_up, None


def gated_activation(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """``activation(gate) * up`` in float32; see :func:`graphwright.ir.ops.activation.gated_activation`.

    Args:
        gate: ``[..., d]``, float16, bfloat16 or float32; a part of wider rows is read where it lies.
        up: like gate. Gradients flow to both.
        activation: one of :data:`graphwright.ir.ops.activation.ACTIVATIONS`.
    """
    result: torch.Tensor = apply(_Gated, gate, up, activation)
    return result


def softmax(x: torch.Tensor) -> torch.Tensor:
    """``exp(x - max x) / Σ exp(x - max x)`` over the last dimension, in float32; ``[..., d]``, without gradients."""
    rows = as_rows(x)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    config = row_config(rows.shape[1])
    launch(
        _softmax,
        (blocks_of(rows.shape[0], config.blocks["ROWS"]),),
        config,
        x=rows,
        y=y,
        rows=rows.shape[0],
        columns=rows.shape[1],
        x_stride=rows.stride(0),
    )
    return y
