"""Linears with weights of which whole blocks are left out, forward and backward."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import triton.language as tl

from graphwright.backends.triton.configurations import Config, choose
from graphwright.backends.triton.kernels.epilogue import Epilogue
from graphwright.backends.triton.kernels.products import add_branch, finish, operand_type
from graphwright.backends.triton.kernels.rows import as_rows
from graphwright.backends.triton.launching import apply, blocks_of, chosen_architecture, kernel, launch
from graphwright.ir.errors import BackendError

BLOCKS = (16, 32, 64)


@dataclass(frozen=True)
class BlockWeight:
    """A weight ``[out, in]`` of which only some blocks are stored, a row of blocks after the other.

    Attributes:
        values: ``[blocks, size, size]``.
        starts: int32 ``[out / size + 1]``: where each row's blocks begin.
        columns: int32 ``[blocks]``: the column of each block, counted in blocks.
        shape: out and in.
        places: int32 ``[blocks]``: which of the values each block has; ``None`` where they are in order.
        is_transposed: whether blocks are stored with their outputs along the second axis.
    """

    values: torch.Tensor
    starts: torch.Tensor
    columns: torch.Tensor
    shape: tuple[int, int]
    places: torch.Tensor | None = None
    is_transposed: bool = False

    @staticmethod
    def of(weight: torch.Tensor, size: int) -> BlockWeight:
        """The blocks of a dense weight that are not all zeros.

        Args:
            weight: ``[out, in]``, multiples of the size.
            size: one of :data:`BLOCKS`.

        Raises:
            BackendError: there are no kernels for the size, or it does not divide the weight.
        """
        outputs, inputs = weight.shape
        if size not in BLOCKS or outputs % size or inputs % size:
            raise BackendError(
                f"a weight {list(weight.shape)} in blocks of {size} has no kernel",
                where="block-sparse linear",
                hint=f"sizes are {', '.join(map(str, BLOCKS))}, and divide the weight",
            )
        tiles = _tiles(weight, size)
        kept = (tiles != 0).any(-1).any(-1)
        columns = kept.nonzero()[:, 1].to(torch.int32)
        return BlockWeight(tiles[kept].contiguous(), _starts(kept.sum(1)), columns, (outputs, inputs))

    @property
    def size(self) -> int:
        """Of a block."""
        return int(self.values.shape[-1])

    @property
    def density(self) -> float:
        """The share of blocks that are stored, of 0..1."""
        return len(self.values) * self.size**2 / max(1, self.shape[0] * self.shape[1])

    @cached_property
    def transposed(self) -> BlockWeight:
        """The transposed weight over the same values, for gradients."""
        counts = self.starts.diff().to(torch.int64)
        rows = torch.arange(len(counts), device=counts.device)
        rows = rows.repeat_interleave(counts, output_size=len(self.columns))
        order = self.columns.argsort(stable=True)
        heights = counts.new_zeros(self.shape[1] // self.size)
        starts = _starts(heights.index_add(0, self.columns, torch.ones_like(self.columns, dtype=torch.int64)))
        places, columns = order.to(torch.int32), rows[order].to(torch.int32)
        return BlockWeight(self.values, starts, columns, self.shape[::-1], places, True)


def _tiles(weight: torch.Tensor, size: int) -> torch.Tensor:
    """``[out / size, in / size, size, size]``."""
    tiles: torch.Tensor = weight.unflatten(1, (-1, size)).unflatten(0, (-1, size)).transpose(1, 2)
    return tiles


def _starts(counts: torch.Tensor) -> torch.Tensor:
    starts = torch.zeros(len(counts) + 1, dtype=torch.int32, device=counts.device)
    starts[1:] = counts.cumsum(0)
    return starts


def density_in_blocks(weight: torch.Tensor, size: int) -> float:
    """The share of blocks of a weight that are not all zeros; 1 where blocks of the size do not divide it."""
    outputs, inputs = weight.shape
    if outputs % size or inputs % size or weight.numel() == 0:
        return 1.0
    return float((_tiles(weight, size) != 0).any(-1).any(-1).double().mean())


@kernel
def _count_not_finite(
    x: tl.tensor,
    counts: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    x_stride: tl.tensor,
    SIZE: tl.constexpr,
    BM: tl.constexpr,
) -> None:
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    j = tl.arange(0, SIZE)
    count = tl.zeros((BM,), tl.int32)
    for start in range(0, columns, SIZE):
        at = x + m.to(tl.int64)[:, None] * x_stride + start + j[None, :]
        value = tl.load(at, (m < rows)[:, None], 0.0).to(tl.float32)
        count += tl.max((value * 0.0 != 0.0).to(tl.int32), 1)
    tl.store(counts + m, count, m < rows)


@kernel
def _linear_blocks(
    x: tl.tensor,
    counts: tl.tensor,
    values: tl.tensor,
    starts: tl.tensor,
    block_columns: tl.tensor,
    places: tl.tensor,
    bias: tl.tensor,
    factor: tl.tensor,
    residual: tl.tensor,
    down: tl.tensor,
    up: tl.tensor,
    branch_scale: tl.tensor,
    y: tl.tensor,
    rows: tl.tensor,
    outputs: tl.tensor,
    x_stride: tl.tensor,
    factor_stride: tl.tensor,
    residual_stride: tl.tensor,
    rank: tl.tensor,
    ACTIVATION: tl.constexpr,
    RANK: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    SIZE: tl.constexpr,
    DOT: tl.constexpr,
    BM: tl.constexpr,
) -> None:
    strip = tl.program_id(0)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    i, j = tl.arange(0, SIZE), tl.arange(0, SIZE)
    total = tl.zeros((BM, SIZE), tl.float32)
    at_x = x + m.to(tl.int64)[:, None] * x_stride + j[None, :]
    first, last = tl.load(starts + strip), tl.load(starts + strip + 1)
    for block in range(first, last):
        left = tl.load(at_x + tl.load(block_columns + block) * SIZE, (m < rows)[:, None], 0.0)
        place = block if places is None else tl.load(places + block)
        own = values + tl.cast(place, tl.int64) * (SIZE * SIZE)
        if TRANSPOSED:
            right = tl.load(own + j[:, None] * SIZE + i[None, :])
        else:
            right = tl.load(own + i[None, :] * SIZE + j[:, None])
        total = tl.dot(left.to(DOT), right.to(DOT), total, input_precision="ieee")
    # Zeros that are not stored are multiplied like any number: what is not finite there makes NaN of its row.
    count = tl.load(counts + m, m < rows, 0)
    if tl.max(count, 0) > 0:
        for block in range(first, last):
            left = tl.load(at_x + tl.load(block_columns + block) * SIZE, (m < rows)[:, None], 0.0).to(tl.float32)
            count -= tl.max((left * 0.0 != 0.0).to(tl.int32), 1)
        total = tl.where((count > 0)[:, None], float("nan"), total)
    n = strip * SIZE + i
    if up is not None:
        total = add_branch(total, n, m, down, up, branch_scale, rank, rows, outputs, RANK, DOT)
    inside = (m < rows)[:, None] & (n < outputs)[None, :]
    total = finish(
        *(total, n[None, :], m[:, None], inside, bias, factor, residual, factor_stride, residual_stride),
        ACTIVATION,
    )
    tl.store(y + m.to(tl.int64)[:, None] * outputs + n[None, :], total.to(y.dtype.element_ty), inside)


class _LinearBlocks(torch.autograd.Function):
    """The product with stored blocks, with the gradients of input and bias."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: BlockWeight, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.weight = weight
        return fused_linear_blocks(x, weight, Epilogue(bias=bias))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grads
        of_x = fused_linear_blocks(grad, ctx.weight.transposed, Epilogue()) if ctx.needs_input_grad[0] else None
        of_bias = grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        return of_x, None, of_bias


def linear_blocks(x: torch.Tensor, weight: BlockWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``y = x Wᵀ + b`` over the blocks that are stored (Gray et al. 2017, "GPU kernels for block-sparse weights", sec.
    2); gradients flow to x (``dx = dy W``, over the same blocks) and the bias.

    Args:
        x: ``[..., in]``, float16, bfloat16 or float32.
        weight: blocks, of x's dtype.
        bias: ``[out]`` or ``None``.

    Returns:
        ``[..., out]`` of x's dtype, sums in float32. Infinity and NaN meet the zeros that are not stored, too, as
        :func:`graphwright.ir.ops.sparse.linear_sparse` has it; to know of them the input is read once more.
    """
    result: torch.Tensor = apply(_LinearBlocks, x, weight, bias)
    return result


def fused_linear_blocks(x: torch.Tensor, weight: BlockWeight, epilogue: Epilogue) -> torch.Tensor:
    """``activation(x Wᵀ + b + s · x Aᵀ Bᵀ) * factor + residual``, without gradients; see :func:`linear_blocks`.

    Raises:
        BackendError: a part of the epilogue, or the input, does not fit the weight.
    """
    outputs, inputs = weight.shape
    if x.shape[-1] != inputs:
        raise BackendError(f"takes {inputs} features, not {x.shape[-1]}", where="block-sparse linear")
    given = as_rows(x)
    rows = given.shape[0]
    epilogue.check(rows, outputs)
    y = torch.empty((*x.shape[:-1], outputs), dtype=x.dtype, device=x.device)
    counts = torch.empty(rows, dtype=torch.int32, device=x.device)
    launch(
        _count_not_finite,
        (blocks_of(rows, 16),),
        Config({"BM": 16}, 2, 3),
        x=given,
        counts=counts,
        rows=rows,
        columns=inputs,
        x_stride=given.stride(0),
        SIZE=weight.size,
    )
    config = choose("linear_blocks", chosen_architecture(x.device))
    launch(
        _linear_blocks,
        (outputs // weight.size, blocks_of(rows, config.blocks["BM"])),
        config,
        x=given,
        counts=counts,
        values=weight.values,
        starts=weight.starts,
        block_columns=weight.columns,
        places=weight.places,
        **epilogue.stored(outputs),
        **epilogue.branch(),
        y=y,
        rows=rows,
        outputs=outputs,
        x_stride=given.stride(0),
        TRANSPOSED=weight.is_transposed,
        SIZE=weight.size,
        DOT=operand_type(x.dtype),
    )
    return y
