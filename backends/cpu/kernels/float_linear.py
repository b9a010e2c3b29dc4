"""Linears that compute in float32 or bfloat16: dense weights, and packed codes whose activations stay floats."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from graphwright.backends.cpu.kernels.base import Kernel, Lowering, Site, stored_floats
from graphwright.backends.cpu.kernels.byte_packing import PANEL, STEP_BYTES, PackedLinear, pack_nbits
from graphwright.backends.cpu.kernels.linear import Linear, unsuitable
from graphwright.ir.ops.codebook import codebook

_STORED = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class PackedFloats:
    """Dense weights in the layout that the kernels stream (``csrc/float_linear_kernels.h``).

    Attributes:
        outputs, columns: of the matrix.
        bfloat16: whether values are bfloat16, or float32.
        values: uint8, flat, ``[panels, steps, 256]``.
        narrow: the values are ``[outputs, columns]`` instead: of few outputs a panel would be padding for the most
            part, and a row's product is as long as its weights take to read.
    """

    outputs: int
    columns: int
    bfloat16: bool
    values: torch.Tensor
    narrow: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads."""
        return self.values.numel()


def pack_floats(weight: torch.Tensor, *, bfloat16: bool = False) -> PackedFloats:
    """Pack ``[out, in]``, float32, float16 or bfloat16.

    Args:
        weight: stored weights.
        bfloat16: round values to bfloat16.
    """
    from graphwright.backends.cpu import _native  # not at the top: it may be absent

    outputs, columns = weight.shape
    if outputs <= _native.MOST_NARROW:
        plain = weight.detach().to(torch.bfloat16 if bfloat16 else torch.float32, copy=True).contiguous()
        return PackedFloats(outputs, columns, bfloat16, plain.reshape(-1).view(torch.uint8), narrow=True)
    panels, steps = -(-outputs // PANEL), -(-columns // 2) if bfloat16 else columns
    values = torch.empty(panels * steps * STEP_BYTES, dtype=torch.uint8)
    stored, threads = weight.detach().contiguous(), torch.get_num_threads()
    if bfloat16 and stored.dtype == torch.bfloat16:
        _native.pack_bfloat16(stored.view(torch.int16).numpy().view(np.uint16), values.numpy(), threads)
    else:
        _native.pack_floats(stored.to(torch.float32).numpy(), bfloat16, values.numpy(), threads)
    return PackedFloats(outputs, columns, bfloat16, values)


class FloatLinear(Linear):
    """``x Wᵀ + b`` on dense weights, with float32 sums.

    Args:
        packed: the weights. Where they are bfloat16 and not narrow, activations are rounded to it.
        isa: instruction set of the kernel.
        bias: ``[out]`` or ``None``.
        note: what to say of the weights' rounding.
    """

    inputs = ("input",)

    def __init__(self, packed: PackedFloats, isa: str, bias: torch.Tensor | None = None, note: str = "") -> None:
        from graphwright.backends.cpu import _native  # not at the top: it may be absent

        make = _native.NarrowLinear if packed.narrow else _native.FloatLinear
        kernel = make(isa, packed.outputs, packed.columns, packed.bfloat16, packed.values.numpy(), stored_floats(bias))
        label = f"float_linear {kernel.isa}, {note or ('bfloat16' if packed.bfloat16 else 'float32')}"
        super().__init__(kernel, packed.columns, packed.outputs, label)
        self.packed = packed


class NbitsLinear(Linear):
    """``linear_nbits`` in floats: the weights stay packed.

    Args:
        packed: the weights.
        group_size: columns of a group.
        isa: instruction set of the kernel.
        bias: ``[out]`` or ``None``.
        bfloat16: weights and activations may be rounded to bfloat16. They are where that is faster: with enough rows,
            on instruction sets that multiply it.
    """

    def __init__(
        self,
        packed: PackedLinear,
        group_size: int,
        isa: str,
        bias: torch.Tensor | None = None,
        *,
        bfloat16: bool = False,
    ) -> None:
        from graphwright.backends.cpu import _native  # not at the top: it may be absent

        kernel = _native.NbitsLinear(
            isa,
            packed.outputs,
            packed.columns,
            f"int{packed.bits}",
            group_size,
            bfloat16,
            packed.codes.numpy(),
            packed.scales.numpy(),
            packed.zeros.numpy() if packed.zeros is not None else None,
            None,
            stored_floats(bias),
        )
        label = f"nbits_linear {kernel.isa}, {packed.described}, {_rounding(kernel.exact_rows)}"
        super().__init__(kernel, packed.columns, packed.outputs, label)
        self.packed = packed


class CodebookLinear(Linear):
    """``linear_codebook``: the weights stay packed, and are looked up or taken apart in registers.

    Args:
        packed: the weights.
        format: of :func:`graphwright.ir.ops.codebook.codebook`.
        group_size: columns of a group.
        isa: instruction set of the kernel.
        bias: ``[out]`` or ``None``.
        bfloat16: see :class:`NbitsLinear`.
    """

    def __init__(
        self,
        packed: PackedLinear,
        format: str,
        group_size: int,
        isa: str,
        bias: torch.Tensor | None = None,
        *,
        bfloat16: bool = False,
    ) -> None:
        from graphwright.backends.cpu import _native  # not at the top: it may be absent

        coding = _CODINGS.get(format, "table4")
        kernel = _native.NbitsLinear(
            isa,
            packed.outputs,
            packed.columns,
            coding,
            group_size,
            bfloat16,
            packed.codes.numpy(),
            packed.scales.numpy(),
            None,
            codebook(format).table.numpy() if coding == "table4" else None,
            stored_floats(bias),
        )
        label = f"codebook_linear {kernel.isa}, {format} weights, {_rounding(kernel.exact_rows)}"
        super().__init__(kernel, packed.columns, packed.outputs, label)
        self.packed = packed


# Formats whose codes the kernels take apart; the others have a table of sixteen.
_CODINGS = {"fp8_e4m3": "e4m3", "fp8_e5m2": "e5m2"}


def _rounding(exact_rows: int | None) -> str:
    if exact_rows is None:
        return "float32"
    return f"weights and activations rounded to bfloat16 beyond {exact_rows} rows"


def _dense(site: Site) -> Kernel | str:
    refusal = unsuitable(site, ("weight", "bias"), "input")
    return refusal or _packed(site, "weight", site.maybe_stored("bias"), transposed=False)


def _addmm(site: Site) -> Kernel | str:
    """``bias + x W``, as GPT-2's ``Conv1D`` writes it."""
    refusal = unsuitable(site, ("mat2", "self"), "mat1")
    if refusal:
        return refusal
    bias = site.stored("self")
    if bias.shape != site.stored("mat2").shape[1:] or (site.arguments["beta"], site.arguments["alpha"]) != (1, 1):
        return "it is not a product and a bias for each output"
    kernel = _packed(site, "mat2", bias, transposed=True)
    if isinstance(kernel, FloatLinear):
        kernel.inputs = ("mat1",)
    return kernel


def _packed(site: Site, name: str, bias: torch.Tensor | None, *, transposed: bool) -> FloatLinear | str:
    weight = site.stored(name)
    if weight.dtype not in _STORED or weight.dim() != 2 or weight.numel() == 0:
        return f"the kernels have no {weight.dtype} weights of shape {list(weight.shape)}"
    note = ""
    if weight.dtype == torch.bfloat16:
        note = "bfloat16 weights and activations"
    elif site.compute == "bfloat16":
        note = "weights and activations rounded to bfloat16"
    rows = weight.t() if transposed else weight
    packed = site.packed_once((name,), lambda: pack_floats(rows, bfloat16=bool(note)))
    if packed.narrow:
        note = note.replace(" and activations", "")
    return FloatLinear(packed, site.isa, bias, note)


def _codebook(site: Site) -> Kernel | str:
    refusal = unsuitable(site, ("qweight", "scales", "bias"))
    if refusal:
        return refusal
    columns, format = int(site.value("x").shape[-1]), site.arguments["format"]
    stored = site.stored("qweight"), site.stored("scales")
    packed = site.packed_once(("qweight", "scales"), lambda: pack_nbits(*stored, None, codebook(format).bits, columns))
    bias, bfloat16 = site.maybe_stored("bias"), site.compute == "bfloat16"
    return CodebookLinear(packed, format, site.arguments["group_size"], site.isa, bias, bfloat16=bfloat16)


LOWERINGS: dict[str, Lowering] = {
    "aten.addmm": _addmm,
    "aten.linear": _dense,
    "graphwright.linear_codebook": _codebook,
}
