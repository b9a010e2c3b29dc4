"""Linears with 8-bit weights and 8-bit activations, whose products tensor cores sum as integers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton.language as tl

from graphwright.backends.triton.configurations import choose
from graphwright.backends.triton.kernels.epilogue import Epilogue
from graphwright.backends.triton.kernels.products import add_branch, block_of_group, finish, operand_type
from graphwright.backends.triton.kernels.rows import as_rows, row_config
from graphwright.backends.triton.launching import blocks_of, chosen_architecture, kernel, launch, part
from graphwright.ir.errors import BackendError


@dataclass(frozen=True)
class Codes:
    """Activations as ``x ≈ (codes - zeros) · scales``.

    Attributes:
        codes: int8 ``[rows, in]``.
        scales: float32 ``[rows]``, or ``[rows, G]`` for groups along the input; NaN for what has no range.
        zeros: float32 ``[rows]``, whole numbers, or ``None`` for 0.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None


@part
def nearest(x: tl.tensor) -> tl.tensor:
    """The nearest whole number, ties to even, of magnitudes below ``2**22``: no bits stay behind the point."""
    return (x + 12582912.0) - 12582912.0


@kernel
def _round_rows(
    x: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    zeros: tl.tensor,
    steps: tl.tensor,
    zero_point: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    x_stride: tl.tensor,
    SYMMETRIC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    there = row < rows
    inside = there[:, None] & (column < columns)[None, :]
    at = row.to(tl.int64)[:, None]
    value = tl.load(x + at * x_stride + column[None, :], inside, 0.0).to(tl.float32)
    # 0 where every value is a finite number, else NaN; a grid known beforehand clips what is infinite.
    if steps is not None:
        value = value / tl.load(steps + column, column < columns, 1.0).to(tl.float32)[None, :]
        bad = tl.sum(tl.where(value != value, value, 0.0), 1)
        value = tl.minimum(tl.maximum(value, -zero_point), 255.0 - zero_point)
        value = tl.where(value != value, 0.0, nearest(value)) + (zero_point - 128.0)
        tl.store(scales + row, 1.0 + bad, there)
        tl.store(zeros + row, zero_point - 128.0 + bad, there)
    elif SYMMETRIC:
        bad = tl.sum(value * 0.0, 1)
        size = tl.max(tl.abs(value), 1)
        some = size >= 1e-35
        value = nearest(value * tl.where(some, 127.0 / tl.where(some, size, 1.0), 0.0)[:, None])
        value = tl.where(bad[:, None] == 0.0, value, 0.0)
        tl.store(scales + row, tl.where(some, size / 127.0, 0.0) + bad, there)
    else:
        bad = tl.sum(value * 0.0, 1)
        low, high = tl.minimum(tl.min(value, 1), 0.0), tl.maximum(tl.max(value, 1), 0.0)
        scale = (high - low) / 255.0
        scale = tl.where(scale == 0.0, 1.0, scale)
        zero = tl.minimum(tl.maximum(nearest(-low / scale), 0.0), 255.0)
        value = tl.minimum(tl.maximum(nearest(value / scale[:, None]) + zero[:, None], 0.0), 255.0) - 128.0
        value = tl.where(bad[:, None] == 0.0, value, 0.0)
        tl.store(scales + row, scale + bad, there)
        tl.store(zeros + row, zero - 128.0, there)
    tl.store(codes + at * columns + column[None, :], value.to(tl.int8), inside)


@kernel
def _linear_int8(
    codes: tl.tensor,
    scales: tl.tensor,
    zeros: tl.tensor,
    weight: tl.tensor,
    weight_scales: tl.tensor,
    weight_sums: tl.tensor,
    bias: tl.tensor,
    factor: tl.tensor,
    residual: tl.tensor,
    down: tl.tensor,
    up: tl.tensor,
    branch_scale: tl.tensor,
    y: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    outputs: tl.tensor,
    groups: tl.tensor,
    factor_stride: tl.tensor,
    residual_stride: tl.tensor,
    rank: tl.tensor,
    ACTIVATION: tl.constexpr,
    RANK: tl.constexpr,
    DOT: tl.constexpr,
    GROUPED: tl.constexpr,
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
) -> None:
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    left = codes + m.to(tl.int64)[:, None] * columns + k[None, :]
    right = weight + n.to(tl.int64)[None, :] * columns + k[:, None]
    sums = tl.zeros((BM, BN), tl.int32)
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, columns, BK):
        within = start + k < columns
        a = tl.load(left + start, (m < rows)[:, None] & within[None, :], 0)
        b = tl.load(right + start, (n < outputs)[None, :] & within[:, None], 0)
        if GROUPED:
            group = start // GROUP
            own = tl.load(scales + m * groups + group, m < rows, 0.0)
            other = tl.load(weight_scales + n * groups + group, n < outputs, 0.0).to(tl.float32)
            total += tl.dot(a, b).to(tl.float32) * own[:, None] * other[None, :]
        else:
            sums = tl.dot(a, b, sums)
    if not GROUPED:
        total = sums.to(tl.float32)
        if zeros is not None:
            zero = tl.load(zeros + m, m < rows, 0.0).to(tl.int32)
            correction = zero[:, None] * tl.load(weight_sums + n, n < outputs, 0)[None, :]
            total = (sums - correction).to(tl.float32)
        total *= tl.load(scales + m, m < rows, 0.0)[:, None]
        total *= tl.load(weight_scales + n, n < outputs, 0.0).to(tl.float32)[None, :]
    if up is not None:
        total = add_branch(total, n, m, down, up, branch_scale, rank, rows, outputs, RANK, DOT)
    inside = (m < rows)[:, None] & (n < outputs)[None, :]
    total = finish(
        *(total, n[None, :], m[:, None], inside, bias, factor, residual, factor_stride, residual_stride),
        ACTIVATION,
    )
    place = y + m.to(tl.int64)[:, None] * outputs + n[None, :]
    tl.store(place, total.to(y.dtype.element_ty), inside)


def round_rows(
    x: torch.Tensor, *, steps: torch.Tensor | None = None, zero_point: int = 0, group_size: int = 0
) -> Codes:
    """8-bit codes of activations.

    Args:
        x: ``[..., in]``, floating.
        steps: ``[in]`` of a grid known beforehand (:func:`graphwright.ir.ops.quantization.linear_int8_static`); codes
            are then of ``x / steps``. By default each row has an asymmetric range of its own.
        zero_point: of that grid, in 0..255.
        group_size: when above 0, groups of so many columns have a symmetric range each, ``greatest |x| / 127``; it
            divides in.
    """
    rows = as_rows(x)
    count, columns = rows.shape
    codes = torch.empty(count, columns, dtype=torch.int8, device=x.device)
    given = rows.reshape(-1, group_size) if group_size else rows
    scales = torch.empty(given.shape[0], dtype=torch.float32, device=x.device)
    zeros = None if group_size else torch.empty_like(scales)
    config = row_config(given.shape[1])
    launch(
        _round_rows,
        (blocks_of(given.shape[0], config.blocks["ROWS"]),),
        config,
        x=given,
        codes=codes,
        scales=scales,
        zeros=zeros,
        steps=steps,
        zero_point=float(zero_point),
        rows=given.shape[0],
        columns=given.shape[1],
        x_stride=given.stride(0),
        SYMMETRIC=group_size > 0,
    )
    return Codes(codes, scales.view(count, -1) if group_size else scales, zeros)


def multiply_codes(
    x: Codes,
    weight: torch.Tensor,
    scales: torch.Tensor,
    sums: torch.Tensor,
    epilogue: Epilogue,
    dtype: torch.dtype,
) -> torch.Tensor:
    """``y = x̂ Ŵᵀ`` of codes, exact up to the scales, with an epilogue.

    Args:
        x: activations.
        weight: int8 ``[out, in]``, symmetric.
        scales: ``[out]``, or ``[out, G]`` with groups as the activations have them.
        sums: int32 ``[out]``, of each row of the weight; the zero points of activations are multiplied with them.
        epilogue: what follows the product.
        dtype: of the result, ``[rows, out]``.

    Raises:
        BackendError: groups of weights and activations differ, or a part of the epilogue does not fit.
    """
    rows, columns = x.codes.shape
    outputs, groups = weight.shape[0], 1 if x.scales.dim() == 1 else x.scales.shape[1]
    if scales.numel() != outputs * groups:
        raise BackendError(
            f"weights have {scales.numel()} scales where activations want {outputs * groups}",
            where="linear_int8 kernel",
        )
    epilogue.check(rows, outputs)
    y = torch.empty(rows, outputs, dtype=dtype, device=x.codes.device)
    config = choose(f"linear_int8{' groups' * (groups > 1)}", chosen_architecture(x.codes.device))
    if groups > 1:
        config = config.with_blocks(BK=block_of_group(columns // groups, where="linear_int8 kernel"))
    launch(
        _linear_int8,
        (blocks_of(outputs, config.blocks["BN"]), blocks_of(rows, config.blocks["BM"])),
        config,
        codes=x.codes,
        scales=x.scales,
        zeros=x.zeros,
        weight=weight,
        weight_scales=scales,
        weight_sums=sums,
        **epilogue.stored(outputs),
        **epilogue.branch(),
        y=y,
        rows=rows,
        columns=columns,
        outputs=outputs,
        groups=groups,
        GROUPED=groups > 1,
        GROUP=columns // groups,
        DOT=operand_type(dtype),
    )
    return y


def sums_of(weight: torch.Tensor) -> torch.Tensor:
    """Sums of a weight's rows, int32 ``[out]``; made once, when a program is lowered."""
    return weight.sum(1, dtype=torch.int32)
