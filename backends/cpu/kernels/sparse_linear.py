"""Linears whose weights are mostly zeros: what is not zero is streamed, and expanded on its way to the product."""

from __future__ import annotations

import numpy as np
import torch

from graphwright.backends.cpu.kernels.base import Kernel, Lowering, Site, stored_floats
from graphwright.backends.cpu.kernels.byte_linear import MOST_COLUMNS
from graphwright.backends.cpu.kernels.linear import Linear, unsuitable
from graphwright.backends.cpu.kernels.sparse_packing import PackedSparse, pack_sparse

_STORED = ("mask", "values", "row_offsets", "scales", "zero_points")


class SparseLinear(Linear):
    """``x Ŵᵀ + b`` on packed sparse weights.

    Args:
        packed: the weights.
        isa: instruction set of the kernel.
        compute: ``float32``; ``int8`` rounds activations to 8 bits, a scale for each row and group of columns;
            ``bfloat16`` lets many rows be rounded to it, as ``NbitsLinear`` does. The last two are for codes only.
        bias: ``[out]`` or ``None``.
    """

    def __init__(self, packed: PackedSparse, isa: str, compute: str, bias: torch.Tensor | None = None) -> None:
        from graphwright.backends.cpu import _native  # not at the top: it may be absent

        kernel = _native.SparseLinear(
            isa,
            packed.outputs,
            packed.columns,
            packed.kind,
            packed.group,
            compute,
            packed.masks.numpy().view(np.uint64),
            packed.values.numpy(),
            packed.offsets.numpy().view(np.uint64),
            packed.scales.numpy() if packed.scales is not None else None,
            packed.zeros.numpy() if packed.zeros is not None else None,
            stored_floats(bias),
        )
        rounding = {
            "int8": "activations rounded to int8 (symmetric)",
            "bfloat16": "many rows rounded to bfloat16",
            "float32": "float32",
        }[compute]
        super().__init__(
            kernel, packed.columns, packed.outputs, f"sparse_linear {kernel.isa}, {packed.described}, {rounding}"
        )
        self.packed = packed


def _sparse(site: Site) -> Kernel | str:
    refusal = unsuitable(site, (*_STORED, "bias"))
    if refusal:
        return refusal
    columns, format, group = int(site.value("x").shape[-1]), site.arguments["format"], site.arguments["group_size"]
    if len(site.stored("mask")) == 0 or columns == 0:
        return "its weight is empty"
    compute = site.compute if format != "float" else "float32"
    if compute == "int8":
        if columns > MOST_COLUMNS:
            return f"it has more than {MOST_COLUMNS} input features"
        if site.stored("scales").shape[1] > 1 and group % 4:
            return "the kernel rounds activations in groups of whole steps of 4 columns"
    operands = [site.maybe_stored(name) for name in _STORED]
    mask, values, offsets, scales, zeros = operands
    assert mask is not None
    assert values is not None
    assert offsets is not None
    try:
        packed = site.packed_once(
            _STORED[:3], lambda: pack_sparse(mask, values, offsets, scales, zeros, format, group, columns)
        )
    except ValueError as error:
        return str(error)
    return SparseLinear(packed, site.isa, compute, site.maybe_stored("bias"))


LOWERINGS: dict[str, Lowering] = {"graphwright.linear_sparse": _sparse}
