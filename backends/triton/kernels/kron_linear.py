"""Linears whose weight is a Kronecker product, without forming it, with the gradients of all operands."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl

from graphwright.backends.triton.configurations import choose
from graphwright.backends.triton.kernels.products import operand_type
from graphwright.backends.triton.kernels.rows import as_rows
from graphwright.backends.triton.launching import apply, blocks_of, chosen_architecture, kernel, launch
from graphwright.ir.ops.kronecker import b_first


@kernel
def _kron_linear(
    x: tl.tensor,
    a: tl.tensor,
    b: tl.tensor,
    y: tl.tensor,
    a1: tl.tensor,
    a2: tl.tensor,
    b1: tl.tensor,
    b2: tl.tensor,
    x_row: tl.tensor,
    x_a: tl.tensor,
    x_b: tl.tensor,
    y_row: tl.tensor,
    y_a: tl.tensor,
    y_b: tl.tensor,
    a_out: tl.tensor,
    a_in: tl.tensor,
    b_out: tl.tensor,
    b_in: tl.tensor,
    scale: tl.tensor,
    DOT: tl.constexpr,
    A1: tl.constexpr,
    A2: tl.constexpr,
    B1: tl.constexpr,
    B2: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(2) * A1 + tl.arange(0, A1)
    j = tl.program_id(1) * B1 + tl.arange(0, B1)
    total = tl.zeros((A1, B1), tl.float32)
    for first in range(0, a2, A2):
        k = first + tl.arange(0, A2)
        inner = tl.zeros((A2, B1), tl.float32)
        for start in range(0, b2, B2):
            m = start + tl.arange(0, B2)
            grid = (k < a2)[:, None] & (m < b2)[None, :]
            left = tl.load(x + row * x_row + k[:, None] * x_a + m[None, :] * x_b, grid, 0.0)
            right = tl.load(b + j[None, :] * b_out + m[:, None] * b_in, (m < b2)[:, None] & (j < b1)[None, :], 0.0)
            inner = tl.dot(left.to(DOT), right.to(DOT), inner, input_precision="ieee")
        factor = tl.load(a + i[:, None] * a_out + k[None, :] * a_in, (i < a1)[:, None] & (k < a2)[None, :], 0.0)
        total = tl.dot(factor.to(DOT), inner.to(DOT), total, input_precision="ieee")
    place = y + row * y_row + i[:, None] * y_a + j[None, :] * y_b
    tl.store(place, (total * scale).to(y.dtype.element_ty), (i < a1)[:, None] & (j < b1)[None, :])


def _multiply(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """``scale · A X Bᵀ`` of rows ``[rows, a2 · b2]``; a and b of any strides."""
    (a1, a2), (b1, b2) = a.shape, b.shape
    y = torch.empty(x.shape[0], a1 * b1, dtype=x.dtype, device=x.device)
    x_strides, y_strides = (b2, 1), (b1, 1)
    if not b_first((a1, a2), (b1, b2)):
        # (A X) Bᵀ is the transpose of B (Xᵀ Aᵀ): the same kernel with the factors and all axes changed.
        a, b, a1, a2, b1, b2 = b, a, b1, b2, a1, a2
        x_strides, y_strides = x_strides[::-1], y_strides[::-1]
    config = choose("kron_linear", chosen_architecture(x.device))
    launch(
        _kron_linear,
        (x.shape[0], blocks_of(b1, config.blocks["B1"]), blocks_of(a1, config.blocks["A1"])),
        config,
        x=x,
        a=a,
        b=b,
        y=y,
        a1=a1,
        a2=a2,
        b1=b1,
        b2=b2,
        x_row=x.stride(0),
        x_a=x_strides[0],
        x_b=x_strides[1],
        y_row=y.stride(0),
        y_a=y_strides[0],
        y_b=y_strides[1],
        a_out=a.stride(0),
        a_in=a.stride(1),
        b_out=b.stride(0),
        b_in=b.stride(1),
        scale=float(scale),
        DOT=operand_type(x.dtype),
    )
    return y


class _Kron(torch.autograd.Function):
    """The product; its factors' gradients are two matrix products over all rows."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.save_for_backward(x, a, b)
        ctx.scale = scale
        return _multiply(as_rows(x), a, b, scale).view(*x.shape[:-1], a.shape[0] * b.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, a, b = ctx.saved_tensors
        (a1, a2), (b1, b2) = a.shape, b.shape
        slope, given = as_rows(grads[0]), as_rows(x)
        of_x = of_a = of_b = None
        if ctx.needs_input_grad[0]:
            of_x = _multiply(slope, a.t(), b.t(), ctx.scale).view(x.shape)
        matrices, slopes = given.reshape(-1, a2, b2), slope.reshape(-1, a1, b1)
        if ctx.needs_input_grad[1]:
            inner = torch.matmul(matrices, b.t())
            of_a = torch.einsum("mij,mkj->ik", slopes, inner) * ctx.scale
        if ctx.needs_input_grad[2]:
            inner = torch.matmul(a.t(), slopes)
            of_b = torch.einsum("mkj,mkl->jl", inner, matrices) * ctx.scale
        return of_x, of_a, of_b, None


def kron_linear(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """``y = scale · x (A ⊗ B)ᵀ``, see :func:`graphwright.ir.ops.kronecker.kron_linear`.

    A program computes a tile of ``A (X Bᵀ)``, or of ``(A X) Bᵀ`` where that is less work, for one row. The first
    product is rounded to x's dtype before the second, as tensor cores take it. With ``G`` the gradient as a matrix,
    ``dX = Aᵀ G B``, ``dA = Σ G (X Bᵀ)ᵀ`` and ``dB = Σ (Aᵀ G)ᵀ X``.

    Args:
        x: ``[..., a2 · b2]``, float16, bfloat16 or float32.
        a: ``[a1, a2]``, of x's dtype.
        b: ``[b1, b2]``, likewise.
        scale: factor of the result.
    """
    result: torch.Tensor = apply(_Kron, x, a, b, scale)
    return result
