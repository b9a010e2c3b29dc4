"""Tensors as the rows that kernels read and write, copied only where memory leaves no other way."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from graphwright.backends.cpu.kernels.base import Site
from graphwright.ir.errors import BackendError

Floats = npt.NDArray[np.float32]


def rows_of(values: Floats, columns: int, order: tuple[int, ...] | None = None) -> Floats:
    """``[rows, columns]``, each row contiguous; a view where the memory allows one.

    Args:
        values: of any shape and strides.
        columns: of the result.
        order: of the dimensions in the result; ``None`` for their own.
    """
    rows = (values if order is None else values.transpose(order)).reshape(-1, columns)
    return rows if rows.strides[1] == 4 or columns == 1 else np.ascontiguousarray(rows)


def result_like(x: torch.Tensor) -> tuple[Floats, tuple[int, ...] | None]:
    """An array for a result in the memory order that PyTorch would give it, and the dimensions in that order.

    Later operators of a program may take views that only this order allows. The dimensions are ``None`` where they lie
    in their own order.
    """
    if not x.is_contiguous():
        result = torch.empty_like(x, dtype=torch.float32)
        if not result.is_contiguous():
            strides = result.stride()
            return result.numpy(), tuple(sorted(range(x.dim()), key=strides.__getitem__, reverse=True))
    return np.empty(x.shape, np.float32), None


def expect_floats(kernel: str, *tensors: torch.Tensor | None) -> None:
    """Refuse what is not on the CPU and floating.

    Raises:
        BackendError: a tensor is neither.
    """
    for x in tensors:
        if x is not None and not (x.is_cpu and x.is_floating_point()):
            raise BackendError(f"takes floating CPU tensors, not {x.dtype} on {x.device}", where=f"{kernel} kernel")


def unsuitable(site: Site, data: str, stored: tuple[str, ...] = ()) -> str:
    """Why a node cannot be computed in float32 from known parameters, or an empty string."""
    dtype = site.value(data).dtype
    if dtype == torch.float64 or not dtype.is_floating_point:
        return f"the kernels compute in float32, not in {str(dtype).removeprefix('torch.')}"
    for name in stored:
        if site.arguments[name] is not None and not site.is_stored(name):
            return f"its {name} is computed, not stored"
    return ""
