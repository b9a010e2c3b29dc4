"""A linear whose weight is nearly all zeros: the few weights that a quantised linear beside it must not round."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from graphwright.ir.ops.definition import OpDefinition

_COLUMN_DTYPES = (torch.int16, torch.int32)
# Products held at once: a long input is taken some rows at a time.
_MOST_PRODUCTS = 1 << 22


def linear_outliers(
    x: torch.Tensor, row_pointers: torch.Tensor, columns: torch.Tensor, values: torch.Tensor
) -> torch.Tensor:
    """``y = x Sᵀ`` with a sparse ``S [out, in]`` in compressed rows.

    Row ``r`` of ``S`` holds ``values[i]`` in column ``columns[i]`` for ``row_pointers[r] <= i < row_pointers[r + 1]``;
    the sum of an output goes through them in this order.

    Args:
        x: ``[..., in]``, floating.
        row_pointers: int32 ``[out + 1]``, from 0 to ``n``, never falling.
        columns: int16 or int32 ``[n]``, below ``in``.
        values: ``[n]``, floating.

    Returns:
        ``[..., out]`` of x's dtype, computed in float32 or wider.

    Raises:
        IndexError: a column lies outside ``x``.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    outputs = len(row_pointers) - 1
    counts = (row_pointers[1:] - row_pointers[:-1]).to(torch.int64)
    rows = torch.repeat_interleave(torch.arange(outputs, device=x.device), counts, output_size=len(columns))
    # By column, so that what is gathered is a row of the transposed input, contiguous.
    flat, places, factors = x.to(wide).reshape(-1, x.shape[-1]), columns.to(torch.int64), values.to(wide).unsqueeze(1)
    step = max(1, _MOST_PRODUCTS // max(1, len(columns)))
    pieces = [
        torch.zeros(outputs, len(piece), dtype=wide, device=x.device).index_add(
            0, rows, piece.t().index_select(0, places) * factors
        )
        for piece in flat.split(step)
    ]
    result = torch.cat(pieces, dim=1).t() if len(pieces) != 1 else pieces[0].t()
    return result.contiguous().view(*x.shape[:-1], outputs).to(x.dtype)


def _fake(x: torch.Tensor, row_pointers: torch.Tensor, columns: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    torch._check(row_pointers.dtype == torch.int32, lambda: f"row_pointers must be int32, not {row_pointers.dtype}")
    torch._check(columns.dtype in _COLUMN_DTYPES, lambda: f"columns must be int16 or int32, not {columns.dtype}")
    torch._check(values.dtype.is_floating_point, lambda: f"values must be floating, not {values.dtype}")
    if row_pointers.dim() != 1 or len(row_pointers) < 1:
        raise ValueError(f"row_pointers must be a vector of at least one number, not {list(row_pointers.shape)}")
    if columns.dim() != 1 or columns.shape != values.shape:
        raise ValueError(f"columns {list(columns.shape)} and values {list(values.shape)} must be vectors of one length")
    return x.new_empty((*x.shape[:-1], row_pointers.shape[0] - 1))


def _macs(arguments: Mapping[str, Any]) -> int:
    count = int(arguments["values"][0])
    for size in arguments["x"][:-1]:
        count *= int(size)
    return count


LINEAR_OUTLIERS = OpDefinition(
    name="linear_outliers",
    schema="(Tensor x, Tensor row_pointers, Tensor columns, Tensor values) -> Tensor",
    reference=linear_outliers,
    fake=_fake,
    macs=_macs,
    differentiable=("x", "values"),
)
