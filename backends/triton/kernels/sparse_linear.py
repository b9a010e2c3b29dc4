"""Linears with sparse weights: whole blocks left out, or two of every four weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl

from graphwright.backends.triton.configurations import choose
from graphwright.backends.triton.kernels.epilogue import Epilogue
from graphwright.backends.triton.kernels.products import finish, operand_type
from graphwright.backends.triton.kernels.rows import as_rows
from graphwright.backends.triton.launching import blocks_of, chosen_architecture, kernel, launch
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
    """

    values: torch.Tensor
    starts: torch.Tensor
    columns: torch.Tensor
    shape: tuple[int, int]

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
        tiles = weight.unflatten(1, (-1, size)).unflatten(0, (-1, size)).transpose(1, 2)
        kept = (tiles != 0).any(-1).any(-1)
        starts = torch.zeros(kept.shape[0] + 1, dtype=torch.int32, device=weight.device)
        starts[1:] = kept.sum(1).cumsum(0)
        columns = kept.nonzero()[:, 1].to(torch.int32)
        return BlockWeight(tiles[kept].contiguous(), starts, columns, (outputs, inputs))

    @property
    def size(self) -> int:
        """Of a block."""
        return int(self.values.shape[-1])


@kernel
def _linear_blocks(
    x: tl.tensor,
    values: tl.tensor,
    starts: tl.tensor,
    block_columns: tl.tensor,
    bias: tl.tensor,
    factor: tl.tensor,
    residual: tl.tensor,
    y: tl.tensor,
    rows: tl.tensor,
    outputs: tl.tensor,
    x_stride: tl.tensor,
    factor_stride: tl.tensor,
    residual_stride: tl.tensor,
    ACTIVATION: tl.constexpr,
    SIZE: tl.constexpr,
    DOT: tl.constexpr,
    BM: tl.constexpr,
) -> None:
    strip = tl.program_id(0)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    i, j = tl.arange(0, SIZE), tl.arange(0, SIZE)
    total = tl.zeros((BM, SIZE), tl.float32)
    for block in range(tl.load(starts + strip), tl.load(starts + strip + 1)):
        column = tl.load(block_columns + block) * SIZE
        left = tl.load(x + m.to(tl.int64)[:, None] * x_stride + column + j[None, :], (m < rows)[:, None], 0.0)
        right = tl.load(values + block * (SIZE * SIZE) + i[None, :] * SIZE + j[:, None])
        total = tl.dot(left.to(DOT), right.to(DOT), total, input_precision="ieee")
    n = strip * SIZE + i
    inside = (m < rows)[:, None] & (n < outputs)[None, :]
    total = finish(
        *(total, n[None, :], m[:, None], inside, bias, factor, residual, factor_stride, residual_stride),
        ACTIVATION,
    )
    tl.store(y + m.to(tl.int64)[:, None] * outputs + n[None, :], total.to(y.dtype.element_ty), inside)


def linear_blocks(x: torch.Tensor, weight: BlockWeight, epilogue: Epilogue | None = None) -> torch.Tensor:
    """``y = x Wᵀ`` over the blocks that are stored; where none is, the input is not looked at.

    Args:
        x: ``[..., in]``, float16, bfloat16 or float32.
        weight: blocks, of x's dtype.
        epilogue: what follows the product; no low-rank branch.

    Returns:
        ``[..., out]`` of x's dtype, sums in float32; without gradients.
    """
    outputs, inputs = weight.shape
    if x.shape[-1] != inputs:
        raise BackendError(f"takes {inputs} features, not {x.shape[-1]}", where="block-sparse linear")
    epilogue = epilogue or Epilogue()
    given = as_rows(x)
    epilogue.check(given.shape[0], outputs)
    y = torch.empty((*x.shape[:-1], outputs), dtype=x.dtype, device=x.device)
    config = choose("linear_blocks", chosen_architecture(x.device))
    launch(
        _linear_blocks,
        (outputs // weight.size, blocks_of(given.shape[0], config.blocks["BM"])),
        config,
        x=given,
        values=weight.values,
        starts=weight.starts,
        block_columns=weight.columns,
        **epilogue.stored(outputs),
        y=y,
        rows=given.shape[0],
        outputs=outputs,
        x_stride=given.stride(0),
        SIZE=weight.size,
        DOT=operand_type(x.dtype),
    )
    return y


def two_of_four(weight: torch.Tensor) -> Any:
    """A weight of which at most two of every four neighbours are not 0, as torch's semi-structured tensor.

    Args:
        weight: ``[out, in]`` on a GPU, float16 or bfloat16; multiples of 64.

    Raises:
        BackendError: it is not so, or lies on the CPU.
    """
    where = "2:4 sparse linear"
    if weight.device.type != "cuda":
        raise BackendError(f"needs a weight on a GPU, not on {weight.device}", where=where, hint="move it there")
    if weight.dtype not in (torch.float16, torch.bfloat16) or weight.shape[0] % 64 or weight.shape[1] % 64:
        raise BackendError(
            f"a weight {weight.dtype} {list(weight.shape)} cannot be stored so",
            where=where,
            hint="use float16 or bfloat16, and sizes that are multiples of 64",
        )
    if bool((weight.unflatten(1, (-1, 4)).count_nonzero(-1) > 2).any()):
        raise BackendError("has groups of four with more than two weights", where=where, hint="prune it to 2:4 first")
    from torch.sparse import to_sparse_semi_structured

    return to_sparse_semi_structured(weight)
