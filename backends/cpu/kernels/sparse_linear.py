"""Linears whose weights are mostly zeros: what is not zero is streamed, and expanded on its way to the product."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from graphwright.backends.cpu.kernels.base import Kernel, Lowering, Site, stored_floats
from graphwright.backends.cpu.kernels.byte_linear import MOST_COLUMNS, ByteLinear
from graphwright.backends.cpu.kernels.byte_packing import PANEL, PackedLinear, pack_int8, pack_nbits
from graphwright.backends.cpu.kernels.float_linear import FloatLinear, NbitsLinear, pack_floats
from graphwright.backends.cpu.kernels.linear import Linear, unsuitable
from graphwright.backends.cpu.kernels.sparse_cost import can_gather, come_in_blocks, least_sparsity, stored_blocks
from graphwright.backends.cpu.kernels.sparse_packing import PackedSparse, pack_sparse
from graphwright.ir.decoder import DecoderLayout
from graphwright.ir.ops.quantization import pack
from graphwright.ir.ops.sparse import bits_of, decompress, dense_codes
from graphwright.ir.ops.sparse_int8 import int8_weight

_STORED = ("mask", "values", "row_offsets", "scales", "zero_points")


class SparseLinear(Linear):
    """``x Ŵᵀ + b`` on packed sparse weights.

    Args:
        packed: the weights.
        isa: instruction set of the kernel.
        compute: ``float32``; ``int8`` rounds activations to 8 bits; ``bfloat16`` lets many rows be rounded to it, as
            ``NbitsLinear`` does. The last two are for codes only.
        bias: ``[out]`` or ``None``.
        rounding: with ``int8``, as for :class:`ByteLinear`; ``shifted`` and ``fixed`` are for one group without zero
            points.
        input_scales: ``[in]``, for ``fixed``.
        input_zero_point: in 0..255, for ``fixed``.
        gather: whether many rows are to skip all zeros, where the instruction set has a kernel for it, at the price of
            a second copy of the weights: of twice the bytes, or with floats of as many (bfloat16 ones become float32).
            For floats, and for ``int8`` with one group and no zero points.
    """

    def __init__(
        self,
        packed: PackedSparse,
        isa: str,
        compute: str,
        bias: torch.Tensor | None = None,
        rounding: str = "symmetric",
        input_scales: torch.Tensor | None = None,
        input_zero_point: int = 0,
        gather: bool = False,
    ) -> None:
        from graphwright.backends.cpu import _native  # not at the top: it may be absent

        blocks = gather and packed.coded and come_in_blocks(packed.density, packed.blocks)
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
            rounding,
            stored_floats(input_scales),
            input_zero_point,
            "blocks" if blocks else "columns" if gather else "",
            torch.get_num_threads(),
        )
        computed = {
            "int8": f"activations rounded to int8 ({rounding})",
            "bfloat16": "many rows rounded to bfloat16",
            "float32": "float32",
        }[compute]
        label = f"sparse_linear {kernel.isa}, {packed.described}, {computed}"
        if kernel.gathered_steps:
            share = kernel.gathered_steps / (-(-packed.outputs // PANEL) * -(-packed.columns // 4))
            label += f", more than a few rows in {share:.0%} of the dense kernel's products"
        elif kernel.blocks:
            label += f", more than a few rows by blocks of four columns, {packed.blocks:.0%} of all"
        elif gather and not packed.coded:
            label += ", many rows on a second copy whose zeros are skipped"
        super().__init__(kernel, packed.columns, packed.outputs, label)
        self.packed = packed


def _sparse(site: Site) -> Kernel | str:
    refusal = unsuitable(site, (*_STORED, "bias"))
    if refusal:
        return refusal
    columns, format, group = int(site.value("x").shape[-1]), site.arguments["format"], site.arguments["group_size"]
    mask, values, offsets = (site.stored(name) for name in _STORED[:3])
    scales, zeros = (site.maybe_stored(name) for name in _STORED[3:])
    if len(mask) == 0 or columns == 0:
        return "its weight is empty"
    bias, kind = site.maybe_stored("bias"), format
    if format == "float":
        kind = "bfloat16" if values.dtype == torch.bfloat16 else "float32"
    rounded = format != "float" and site.compute == "int8"
    if rounded and columns > MOST_COLUMNS:
        return f"it has more than {MOST_COLUMNS} input features"
    if rounded and scales is not None and scales.shape[1] > 1 and group % 4:
        return "the kernel rounds activations in groups of whole steps of 4 columns"
    zeroed = _Zeros.of(mask, offsets, columns)
    gathers = format == "float" or (rounded and zeros is None and scales is not None and scales.shape[1] == 1)
    against = _against(site, kind, zeroed, rounded=rounded, gathers=gathers)
    whole = format == "float" or group * bits_of(format) % 32 == 0 or (scales is not None and scales.shape[1] == 1)
    if against and whole:
        return _dense(site, columns, bias, against)
    operands = mask, values, offsets, scales, zeros, format, group, columns
    try:
        packed = site.packed_once(_STORED[:3], lambda: pack_sparse(*operands))
    except ValueError as error:
        return str(error)
    gathers = gathers and not against and can_gather(site.isa, kind, _rows(site))
    compute = site.compute if format != "float" else "float32"
    kernel = SparseLinear(packed, site.isa, compute, bias, gather=gathers)
    if not against:
        kernel.label += _pays(site, kind, zeroed, gathers=gathers)
    return kernel


@dataclass(frozen=True)
class _Zeros:
    """Of a weight: the share of zeros, and whether they come in blocks of four columns."""

    share: float
    blocks: bool

    @classmethod
    def of(cls, mask: torch.Tensor, row_offsets: torch.Tensor, columns: int) -> _Zeros:
        density = int(row_offsets[-1]) / (len(mask) * columns)
        blocks = stored_blocks(mask) / (len(mask) * -(-columns // 4))
        return cls(1 - density, come_in_blocks(density, blocks))


def _pays(site: Site, kind: str, zeroed: _Zeros, *, gathers: bool) -> str:
    """From where on zeros pay, for the label."""
    least = least_sparsity(site.isa, kind, _rows(site), gathers=gathers, blocks=zeroed.blocks)
    return f"; faster than dense from {least:.0%} zeros on" if least is not None else ""


def _rows(site: Site) -> int:
    """Rows of the input: of a decoder one, as its steps have few; elsewhere those of the examples it was traced on."""
    if DecoderLayout.find(site.program) is not None:
        return 1
    rows = 1
    for size in site.value("x").shape[:-1]:
        rows *= size if isinstance(size, int) else size.node.hint or 1
    return rows


def _against(site: Site, kind: str, zeroed: _Zeros, *, rounded: bool, gathers: bool) -> str:
    """Why the dense kernel is faster, or an empty string."""
    if kind in ("int8", "int4") and not rounded:
        return "zeros of codes save time only where activations are rounded too (compute='int8')"
    rows = _rows(site)
    least = least_sparsity(site.isa, kind, rows, gathers=gathers, blocks=zeroed.blocks)
    if least is None:
        return f"the dense kernel is faster with {rows} rows, whatever the share of zeros"
    if zeroed.share < least:
        return f"{zeroed.share:.1%} of the weights are zeros, and with {rows} rows {least:.0%} would pay"
    return ""


def _dense(site: Site, columns: int, bias: torch.Tensor | None, why: str) -> Kernel | str:
    """The dense kernel of the same values."""
    mask, values, offsets = (site.stored(name) for name in _STORED[:3])
    scales, zeros = (site.maybe_stored(name) for name in _STORED[3:])
    format, group = site.arguments["format"], site.arguments["group_size"]
    kernel: Linear
    if format == "float":
        operands = mask, values.detach(), offsets, None, None, format, group, columns
        own = values.dtype if values.dtype == torch.bfloat16 else torch.float32
        bfloat16 = own == torch.bfloat16 or site.compute == "bfloat16"
        floats = site.packed_once(_STORED[:3], lambda: pack_floats(decompress(*operands, own), bfloat16=bfloat16))
        kernel = FloatLinear(floats, site.isa, bias)
        kernel.inputs = ("x",)
    else:
        assert scales is not None
        bits, factors = bits_of(format), scales

        def pack_dense() -> PackedLinear:
            codes = dense_codes(mask, values, offsets, zeros, format, group, columns)
            return pack_nbits(pack(codes, bits, group, zeros), factors, zeros, bits, columns)

        packed = site.packed_once(_STORED[:3], pack_dense)
        if site.compute == "int8":
            kernel = ByteLinear(packed, site.isa, "symmetric", bias)
        else:
            kernel = NbitsLinear(packed, group, site.isa, bias, bfloat16=site.compute == "bfloat16")
    kernel.label += f"; dense, as {why}"
    return kernel


def _dynamic(site: Site) -> Kernel | str:
    if site.arguments["activation"] != "per_token":
        return "ranges of the whole tensor have no kernel; per token they have"
    return _rounded(site, "shifted", None, 0)


def _static(site: Site) -> Kernel | str:
    if not site.is_stored("input_scales"):
        return "its input_scales are computed, not stored"
    return _rounded(site, "fixed", site.stored("input_scales"), site.arguments["input_zero_point"])


def _rounded(site: Site, rounding: str, input_scales: torch.Tensor | None, input_zero_point: int) -> Kernel | str:
    """A linear that rounds its activations whatever linears compute in."""
    names = ("mask", "values", "row_offsets", "scales")
    refusal = unsuitable(site, (*names, "bias"))
    if refusal:
        return refusal
    columns = int(site.value("x").shape[-1])
    mask, values, offsets, scales = (site.stored(name) for name in names)
    if len(mask) == 0 or columns == 0:
        return "its weight is empty"
    if columns > MOST_COLUMNS:
        return f"it has more than {MOST_COLUMNS} input features"
    bias, grid = site.maybe_stored("bias"), (input_scales, input_zero_point)
    zeroed = _Zeros.of(mask, offsets, columns)
    against = _against(site, "int8", zeroed, rounded=True, gathers=True)
    if against:
        dense = site.packed_once(names, lambda: pack_int8(int8_weight(mask, values, columns), scales))
        kernel: Linear = ByteLinear(dense, site.isa, rounding, bias, *grid)
        kernel.label += f"; dense, as {against}"
        return kernel
    operands = mask, values, offsets, scales.unsqueeze(1).to(torch.float32), None, "int8", columns, columns
    try:
        packed = site.packed_once(names, lambda: pack_sparse(*operands))
    except ValueError as error:
        return str(error)
    gathers = can_gather(site.isa, "int8", _rows(site))
    kernel = SparseLinear(packed, site.isa, "int8", bias, rounding, *grid, gather=gathers)
    kernel.label += _pays(site, "int8", zeroed, gathers=gathers)
    return kernel


LOWERINGS: dict[str, Lowering] = {
    "graphwright.linear_sparse": _sparse,
    "graphwright.linear_sparse_dynamic": _dynamic,
    "graphwright.linear_sparse_static": _static,
}
