"""Linears on packed 4- and 8-bit weights: few rows, many rows, and the gradient of the input.

The weight is the left operand of the tensor cores and is unpacked in registers, the input the right one: ``yᵀ = Ŵ xᵀ``.
Codes become floats without a conversion: as the low bits of ``2**23`` they are read as ``2**23 + code``, and the zero
point goes away with ``2**23`` in one exact subtraction. With few rows, sums are kept for a group and scaled
afterwards, so a weight costs no multiplication and is not rounded; programs share out the input (split-K), and a
second kernel adds their sums, in a fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl

from graphwright.backends.triton.configurations import Config, choose
from graphwright.backends.triton.kernels.epilogue import Epilogue
from graphwright.backends.triton.kernels.nbits_weight import NbitsWeight
from graphwright.backends.triton.kernels.products import finish, operand_type, processors
from graphwright.backends.triton.kernels.rows import as_rows
from graphwright.backends.triton.launching import apply, blocks_of, chosen_architecture, kernel, launch, part
from graphwright.ir.errors import BackendError

# Up to so many rows reading the weight is what takes time.
FEW_ROWS = 16
# Programs to a processor that keep its memory pipeline full, when programs share out the input.
_WAVES = 4


@part
def _steps(codes: tl.tensor, zeros: tl.tensor, at: tl.tensor, there: tl.tensor, MIDDLE: tl.constexpr) -> tl.tensor:
    """``code - zero point``, float32 ``[outputs, columns]``."""
    middle = tl.zeros(at.shape, tl.float32) + MIDDLE
    if zeros is not None:
        middle = tl.load(zeros + at, there, 0).to(tl.float32)
    shifted = (codes.to(tl.uint32) | 0x4B000000).to(tl.float32, bitcast=True)
    return shifted - (middle + 8388608.0)[:, None]


@part
def _add_half(
    total: tl.tensor,
    codes: tl.tensor,
    start: tl.tensor,
    x: tl.tensor,
    scales: tl.tensor,
    zeros: tl.tensor,
    n: tl.tensor,
    m: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    outputs: tl.tensor,
    groups: tl.tensor,
    x_stride: tl.tensor,
    GROUP: tl.constexpr,
    HALF: tl.constexpr,
    MIDDLE: tl.constexpr,
    AFTER: tl.constexpr,
    DOT: tl.constexpr,
) -> tl.tensor:
    """The product with ``HALF`` columns from ``start`` on, which have one scale to an output."""
    column = start + tl.arange(0, HALF)
    group = start // GROUP
    there = (n < outputs) & (group + 0 * n < groups)
    at = n * groups + group
    scale = tl.load(scales + at, there, 0.0).to(tl.float32)
    inside = (column < columns)[:, None] & (m < rows)[None, :]
    values = tl.load(x + m.to(tl.int64)[None, :] * x_stride + column[:, None], inside, 0.0).to(DOT)
    steps = _steps(codes, zeros, at, there, MIDDLE)
    if AFTER:
        total += tl.dot(steps.to(DOT), values, input_precision="ieee") * scale[:, None]
    else:
        total = tl.dot((steps * scale[:, None]).to(DOT), values, total, input_precision="ieee")
    return total


@kernel
def _linear_nbits(
    x: tl.tensor,
    packed: tl.tensor,
    scales: tl.tensor,
    zeros: tl.tensor,
    bias: tl.tensor,
    factor: tl.tensor,
    residual: tl.tensor,
    down: tl.tensor,
    up: tl.tensor,
    branch_scale: tl.tensor,
    y: tl.tensor,
    partial: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    outputs: tl.tensor,
    groups: tl.tensor,
    row_bytes: tl.tensor,
    x_stride: tl.tensor,
    factor_stride: tl.tensor,
    residual_stride: tl.tensor,
    rank: tl.tensor,
    chunks: tl.tensor,
    share: tl.tensor,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    HALF: tl.constexpr,
    AFTER: tl.constexpr,
    RANK: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DOT: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
) -> None:
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    split = tl.program_id(2)
    total = tl.zeros((BN, BM), tl.float32)
    byte = tl.arange(0, HALF)
    at = packed + n.to(tl.int64)[:, None] * row_bytes + byte[None, :]
    MIDDLE: tl.constexpr = 1 << (BITS - 1)
    for chunk in range(split * share, tl.minimum((split + 1) * share, chunks)):
        codes = tl.load(at + chunk * HALF, (n < outputs)[:, None], 0)
        if BITS == 4:
            start = chunk * (2 * HALF)
            total = _add_half(
                *(total, codes & 15, start, x, scales, zeros, n, m, rows, columns, outputs, groups, x_stride),
                *(GROUP, HALF, MIDDLE, AFTER, DOT),
            )
            total = _add_half(
                *(total, codes >> 4, start + HALF, x, scales, zeros, n, m, rows, columns, outputs, groups, x_stride),
                *(GROUP, HALF, MIDDLE, AFTER, DOT),
            )
        else:
            total = _add_half(
                *(total, codes, chunk * HALF, x, scales, zeros, n, m, rows, columns, outputs, groups, x_stride),
                *(GROUP, HALF, MIDDLE, AFTER, DOT),
            )
    if up is not None:
        if split == 0:
            r = tl.arange(0, RANK)
            left = tl.load(up + n[:, None] * rank + r[None, :], (n < outputs)[:, None] & (r < rank)[None, :], 0.0)
            at_down = down + m.to(tl.int64)[None, :] * rank + r[:, None]
            right = tl.load(at_down, (m < rows)[None, :] & (r < rank)[:, None], 0.0)
            total += branch_scale * tl.dot(left.to(DOT), right.to(DOT), input_precision="ieee")
    inside = (n < outputs)[:, None] & (m < rows)[None, :]
    place = m.to(tl.int64)[None, :] * outputs + n[:, None]
    if partial is not None:
        tl.store(partial + split.to(tl.int64) * rows * outputs + place, total, inside)
    else:
        total = finish(
            *(total, n[:, None], m[None, :], inside, bias, factor, residual, factor_stride, residual_stride),
            ACTIVATION,
        )
        tl.store(y + place, total.to(y.dtype.element_ty), inside)


@kernel
def _add_splits(
    partial: tl.tensor,
    bias: tl.tensor,
    factor: tl.tensor,
    residual: tl.tensor,
    y: tl.tensor,
    rows: tl.tensor,
    outputs: tl.tensor,
    factor_stride: tl.tensor,
    residual_stride: tl.tensor,
    SPLITS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    m = tl.program_id(1)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = n < outputs
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(SPLITS):
        total += tl.load(partial + (split * rows + m) * outputs + n, inside, 0.0)
    total = finish(total, n, m, inside, bias, factor, residual, factor_stride, residual_stride, ACTIVATION)
    tl.store(y + m * outputs + n, total.to(y.dtype.element_ty), inside)


@kernel
def _linear_nbits_gradient(
    grad: tl.tensor,
    packed: tl.tensor,
    scales: tl.tensor,
    zeros: tl.tensor,
    result: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    outputs: tl.tensor,
    groups: tl.tensor,
    row_bytes: tl.tensor,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    HALF: tl.constexpr,
    DOT: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
) -> None:
    chunk = tl.program_id(0)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    byte = tl.arange(0, HALF)
    PARTS: tl.constexpr = 8 // BITS
    MIDDLE: tl.constexpr = 1 << (BITS - 1)
    low = tl.zeros((HALF, BM), tl.float32)
    high = tl.zeros((HALF, BM), tl.float32)
    start = chunk * (PARTS * HALF)
    for first in range(0, outputs, BN):
        n = first + tl.arange(0, BN)
        codes = tl.load(
            packed + n.to(tl.int64)[:, None] * row_bytes + chunk * HALF + byte[None, :], (n < outputs)[:, None], 0
        )
        inside = (n < outputs)[:, None] & (m < rows)[None, :]
        slopes = tl.load(grad + m.to(tl.int64)[None, :] * outputs + n[:, None], inside, 0.0).to(DOT)
        for half in tl.static_range(PARTS):
            group = (start + half * HALF) // GROUP
            there = (n < outputs) & (group + 0 * n < groups)
            at = n * groups + group
            scale = tl.load(scales + at, there, 0.0).to(tl.float32)
            own = codes
            if BITS == 4:
                own = (codes >> 4) if half == 1 else (codes & 15)
            weight = (_steps(own, zeros, at, there, MIDDLE) * scale[:, None]).to(DOT)
            if half == 0:
                low = tl.dot(tl.trans(weight), slopes, low, input_precision="ieee")
            else:
                high = tl.dot(tl.trans(weight), slopes, high, input_precision="ieee")
    column = start + byte
    place = result + m.to(tl.int64)[None, :] * columns + column[:, None]
    tl.store(place, low.to(result.dtype.element_ty), (column < columns)[:, None] & (m < rows)[None, :])
    if BITS == 4:
        inside = (column + HALF < columns)[:, None] & (m < rows)[None, :]
        tl.store(place + HALF, high.to(result.dtype.element_ty), inside)


class _LinearNbits(torch.autograd.Function):
    """The product with a packed weight, with the gradients of input and bias."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: NbitsWeight, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.weight, ctx.dtype = weight, x.dtype
        return fused_linear_nbits(x, weight, Epilogue(bias=bias))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grads
        of_x = input_gradient(grad, ctx.weight) if ctx.needs_input_grad[0] else None
        of_bias = grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        return of_x, None, of_bias


def linear_nbits(x: torch.Tensor, weight: NbitsWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``y = x Ŵᵀ + b``, see :func:`graphwright.ir.ops.quantization.linear_nbits`; gradients flow to x and the bias.

    Args:
        x: ``[..., in]``, float16, bfloat16 or float32, of any strides.
        weight: packed.
        bias: ``[out]`` or ``None``.

    Returns:
        ``[..., out]`` of x's dtype. Sums are float32. With more than :data:`FEW_ROWS` rows, weights are rounded to x's
        dtype first.
    """
    result: torch.Tensor = apply(_LinearNbits, x, weight, bias)
    return result


def fused_linear_nbits(
    x: torch.Tensor, weight: NbitsWeight, epilogue: Epilogue, *, splits: int | None = None
) -> torch.Tensor:
    """``activation(x Ŵᵀ + b + s · x Aᵀ Bᵀ) * factor + residual``, without gradients; see :func:`linear_nbits`.

    Args:
        x: ``[..., in]``.
        weight: packed.
        epilogue: what follows the product.
        splits: programs that share the input of an output; as many as fill the GPU by default.

    Raises:
        BackendError: a part of the epilogue, or the input, does not fit the weight.
    """
    if x.shape[-1] != weight.columns:
        raise BackendError(f"takes {weight.columns} features, not {x.shape[-1]}", where="linear_nbits kernel")
    given, outputs = as_rows(x), weight.outputs
    rows = given.shape[0]
    epilogue.check(rows, outputs)
    y = torch.empty((*x.shape[:-1], outputs), dtype=x.dtype, device=x.device)
    is_few = rows <= FEW_ROWS
    kind = "few" if is_few else "many fused" if epilogue.is_long else "many"
    config = choose(f"linear_nbits {kind}", chosen_architecture(x.device))
    if x.dtype == torch.float32 and not is_few:  # operands are twice as wide
        config = Config({"BN": 64, "BM": 32}, 4, 2)
    grid = blocks_of(outputs, config.blocks["BN"]), blocks_of(rows, config.blocks["BM"])
    if splits is None:
        splits = _splits(grid[0] * grid[1], weight.chunks, processors(x.device)) if is_few else 1
    share = blocks_of(weight.chunks, splits)
    splits = max(1, blocks_of(weight.chunks, share)) if share else 1
    partial = torch.empty(splits, rows, outputs, dtype=torch.float32, device=x.device) if splits > 1 else None
    stored = epilogue.stored(outputs)
    launch(
        _linear_nbits,
        (*grid, splits),
        config,
        x=given,
        **_weight(weight),
        **{name: value for name, value in stored.items() if partial is None or name.isupper() or "stride" in name},
        **({} if partial is None else {"bias": None, "factor": None, "residual": None}),
        **epilogue.branch(),
        y=y,
        partial=partial,
        rows=rows,
        x_stride=given.stride(0),
        chunks=weight.chunks,
        share=share,
        AFTER=is_few,
        DOT=operand_type(x.dtype),
    )
    if partial is not None:
        block = 256
        launch(
            _add_splits,
            (blocks_of(outputs, block), rows),
            Config({"BLOCK": block}, 2, 1),
            partial=partial,
            **stored,
            y=y,
            rows=rows,
            outputs=outputs,
            SPLITS=splits,
        )
    return y


def input_gradient(grad: torch.Tensor, weight: NbitsWeight) -> torch.Tensor:
    """``dx = dy Ŵ``, ``[..., in]`` of dy's dtype; weights are rounded to that dtype."""
    given = as_rows(grad).contiguous()
    rows = given.shape[0]
    result = torch.empty((*grad.shape[:-1], weight.columns), dtype=grad.dtype, device=grad.device)
    config = choose("linear_nbits input gradient", chosen_architecture(grad.device))
    launch(
        _linear_nbits_gradient,
        (weight.chunks, blocks_of(rows, config.blocks["BM"])),
        config,
        grad=given,
        **_weight(weight),
        result=result,
        rows=rows,
        DOT=operand_type(grad.dtype),
    )
    return result


def _weight(weight: NbitsWeight) -> dict[str, Any]:
    return {
        "packed": weight.packed,
        "scales": weight.scales,
        "zeros": weight.zero_points,
        "columns": weight.columns,
        "outputs": weight.outputs,
        "groups": weight.scales.shape[1],
        "row_bytes": weight.packed.shape[1],
        "BITS": weight.bits,
        "GROUP": weight.group_size,
        "HALF": weight.half,
    }


def _splits(programs: int, chunks: int, processors: int) -> int:
    """Programs that share the input, a power of two: enough to fill the GPU, with four chunks at least to each."""
    splits = 1
    while programs * splits < _WAVES * processors and chunks >= 8 * splits:
        splits *= 2
    return splits
