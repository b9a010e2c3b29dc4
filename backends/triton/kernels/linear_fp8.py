"""Linears with FP8 weights and FP8 activations (E4M3), with a scale for each row or group.

For Ada, Hopper and later. AMD's gfx942 has FP8 of another kind (FNUZ): there Triton multiplies these numbers, which
float16 holds exactly, in float16.
"""

from __future__ import annotations

import torch
import triton.language as tl

from graphwright.backends.triton.configurations import choose
from graphwright.backends.triton.kernels.epilogue import Epilogue
from graphwright.backends.triton.kernels.products import add_branch, block_of_group, finish, operand_type
from graphwright.backends.triton.kernels.rows import as_rows, row_config
from graphwright.backends.triton.launching import blocks_of, chosen_architecture, kernel, launch, part
from graphwright.ir.errors import BackendError

# The largest number of E4M3, and the oldest architecture that multiplies it.
LARGEST = 448.0
OLDEST = 89


@part
def _to_grid(x: tl.tensor) -> tl.tensor:
    """The nearest number of E4M3, ties to even, of magnitudes up to 448; float32.

    Rounded in float32, so that the conversion that follows is exact wherever it runs.
    """
    bits = x.to(tl.uint32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & 0xFFF00000).to(tl.float32, bitcast=True)
    # Below 2**-6 numbers are 2**-9 apart.
    small = (x + 24576.0) - 24576.0
    return tl.where(tl.abs(x) < 0.015625, small, normal)


@kernel
def _round_fp8(
    x: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
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
    value = tl.load(x + at * x_stride + column[None, :], inside, 0.0).to(tl.float32)
    bad = tl.sum(value * 0.0, 1)
    size = tl.max(tl.abs(value), 1)
    scale = tl.where(size >= 1e-35, size / 448.0, 1.0)
    value = _to_grid(tl.where(bad[:, None] == 0.0, value / scale[:, None], 0.0))
    tl.store(scales + row, scale + bad, row < rows)
    tl.store(codes + at * columns + column[None, :], value.to(codes.dtype.element_ty), inside)


@kernel
def _linear_fp8(
    codes: tl.tensor,
    scales: tl.tensor,
    weight: tl.tensor,
    weight_scales: tl.tensor,
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
    own_groups: tl.tensor,
    factor_stride: tl.tensor,
    residual_stride: tl.tensor,
    rank: tl.tensor,
    ACTIVATION: tl.constexpr,
    RANK: tl.constexpr,
    DOT: tl.constexpr,
    GROUPED: tl.constexpr,
    GROUP: tl.constexpr,
    OWN_GROUPED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
) -> None:
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    left = codes + m.to(tl.int64)[:, None] * columns + k[None, :]
    right = weight + n.to(tl.int64)[None, :] * columns + k[:, None]
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, columns, BK):
        within = start + k < columns
        a = tl.load(left + start, (m < rows)[:, None] & within[None, :], 0.0)
        b = tl.load(right + start, (n < outputs)[None, :] & within[:, None], 0.0)
        if GROUPED:
            group = start // GROUP
            own = tl.load(scales + m * own_groups + (group if OWN_GROUPED else 0), m < rows, 0.0)
            other = tl.load(weight_scales + n * groups + group, n < outputs, 0.0).to(tl.float32)
            total += tl.dot(a, b) * own[:, None] * other[None, :]
        else:
            # Tensor cores keep few bits of FP8 sums; they are added to float32 ones every 128 columns.
            total = tl.dot(a, b, total, max_num_imprecise_acc=BK if BK < 128 else 128)
    if not GROUPED:
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


def round_fp8(x: torch.Tensor, *, group_size: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """``x ≈ codes · scales`` with ``scale = greatest |x| / 448`` of each row, or of each group of columns.

    Args:
        x: ``[..., in]``, floating.
        group_size: columns to a group, which divides in; 0 for whole rows.

    Returns:
        float8_e4m3fn ``[rows, in]`` and float32 ``[rows]`` or ``[rows, G]``. Rows that hold NaN or infinity have a NaN
        scale.
    """
    rows = as_rows(x)
    given = rows.reshape(-1, group_size) if group_size else rows
    codes = torch.empty(rows.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(given.shape[0], dtype=torch.float32, device=x.device)
    config = row_config(given.shape[1])
    launch(
        _round_fp8,
        (blocks_of(given.shape[0], config.blocks["ROWS"]),),
        config,
        x=given,
        codes=codes,
        scales=scales,
        rows=given.shape[0],
        columns=given.shape[1],
        x_stride=given.stride(0),
    )
    return codes, scales.view(rows.shape[0], -1) if group_size else scales


def linear_fp8(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    epilogue: Epilogue | None = None,
    *,
    per_group: bool = True,
) -> torch.Tensor:
    """``y = x̂ Ŵᵀ`` with activations rounded to FP8 on the fly, see
    :func:`graphwright.ir.ops.rounded_activations.linear_fp8_dynamic`.

    Hopper's tensor cores keep 14 bits of a sum of FP8 products (DeepSeek-AI 2024, "DeepSeek-V3", sec. 3.3.2); here they
    are added in float32 every 128 columns, or every group.

    Args:
        x: ``[..., in]``, floating.
        weight: float8_e4m3fn ``[out, in]``.
        scales: ``[out]``, or ``[out, G]`` for groups along the input.
        per_group: activations have a scale for each row and group of the weight; else one for each row.
        epilogue: what follows the product.

    Returns:
        ``[..., out]`` of x's dtype.

    Raises:
        BackendError: the GPU has no FP8 tensor cores, or scales do not fit.
    """
    arch = chosen_architecture(x.device)
    if arch < OLDEST:
        raise BackendError(
            f"FP8 products need compute capability {OLDEST / 10:.1f}, this GPU has {arch / 10:.1f}",
            where="linear_fp8 kernel",
            hint="use INT8 activations (linear_int8_dynamic) there",
        )
    outputs, columns = weight.shape
    groups = 1 if scales.dim() == 1 else scales.shape[1]
    by_group = per_group and groups > 1
    if x.shape[-1] != columns or columns % groups or scales.shape[0] != outputs:
        raise BackendError(
            f"x {list(x.shape)}, weight {list(weight.shape)} and scales {list(scales.shape)} do not fit",
            where="linear_fp8 kernel",
        )
    epilogue = epilogue or Epilogue()
    rows = x.shape[:-1].numel()
    epilogue.check(rows, outputs)
    codes, own = round_fp8(x, group_size=columns // groups if by_group else 0)
    y = torch.empty((*x.shape[:-1], outputs), dtype=x.dtype, device=x.device)
    config = choose("linear_fp8", arch)
    if groups > 1:
        config = config.with_blocks(BK=block_of_group(columns // groups, where="linear_fp8 kernel"))
    launch(
        _linear_fp8,
        (blocks_of(outputs, config.blocks["BN"]), blocks_of(rows, config.blocks["BM"])),
        config,
        codes=codes,
        scales=own,
        weight=weight,
        weight_scales=scales.contiguous(),
        **epilogue.stored(outputs),
        **epilogue.branch(),
        y=y,
        rows=rows,
        columns=columns,
        outputs=outputs,
        groups=groups,
        own_groups=groups if by_group else 1,
        OWN_GROUPED=by_group,
        GROUPED=groups > 1,
        GROUP=columns // groups,
        DOT=operand_type(x.dtype),
    )
    return y
