"""Linears on packed integer weights whose activations are rounded to 8 bits."""

from __future__ import annotations

import torch

from graphwright.backends.cpu.kernels.base import Kernel, Lowering, Site, stored_floats
from graphwright.backends.cpu.kernels.byte_packing import PackedLinear, pack_int8, pack_nbits
from graphwright.backends.cpu.kernels.float_linear import NbitsLinear
from graphwright.backends.cpu.kernels.linear import Linear, unsuitable

# The kernels' sums are int32.
MOST_COLUMNS = 32768


class ByteLinear(Linear):
    """A linear on packed integer weights; activations are rounded to 8 bits in the kernel.

    Args:
        packed: the weights.
        isa: instruction set of the kernel.
        rounding: of the activations: ``symmetric`` (a scale for each row and group, as it comes), ``shifted`` (a scale
            and zero point for each row) or ``fixed`` (``input_scales`` and ``input_zero_point``).
        bias: ``[out]`` or ``None``.
        input_scales: ``[in]``, for ``fixed``.
        input_zero_point: in 0..255, for ``fixed``.
    """

    def __init__(
        self,
        packed: PackedLinear,
        isa: str,
        rounding: str,
        bias: torch.Tensor | None = None,
        input_scales: torch.Tensor | None = None,
        input_zero_point: int = 0,
    ) -> None:
        from graphwright.backends.cpu import _native  # not at the top: it may be absent

        kernel = _native.ByteLinear(
            isa,
            packed.outputs,
            packed.columns,
            packed.bits,
            packed.group,
            packed.codes.numpy(),
            packed.scales.numpy(),
            packed.zeros.numpy() if packed.zeros is not None else None,
            packed.sums.numpy() if packed.sums is not None else None,
            stored_floats(bias),
            rounding,
            stored_floats(input_scales),
            input_zero_point,
        )
        label = f"byte_linear {kernel.isa}, {packed.described}, activations rounded to int8 ({rounding})"
        super().__init__(kernel, packed.columns, packed.outputs, label)
        self.packed, self.rounding = packed, rounding


def _too_wide(site: Site) -> str:
    wide = site.value("x").shape[-1] > MOST_COLUMNS
    return f"it has more than {MOST_COLUMNS} input features" if wide else ""


def _nbits(site: Site) -> Kernel | str:
    return _packed(site, rounded=site.compute == "int8")


def _nbits_dynamic(site: Site) -> Kernel | str:
    if site.arguments["activation_bits"] != 8:
        return "there is no kernel for activations of 4 bits"
    if site.arguments["activation"] != "per_group":
        return "the kernel for such weights rounds activations per group; per token has no kernel"
    return _packed(site, rounded=True)


def _outliers(site: Site) -> str:
    return "there is no kernel for sparse weights"


def _packed(site: Site, *, rounded: bool) -> Kernel | str:
    refusal = unsuitable(site, ("qweight", "scales", "zero_points", "bias")) or (_too_wide(site) if rounded else "")
    if refusal:
        return refusal
    zeros = site.maybe_stored("zero_points")
    if zeros is not None and zeros.is_floating_point():
        return "its zero points are floats, and kernels multiply whole ones"
    columns, bits, size = int(site.value("x").shape[-1]), site.arguments["bits"], site.arguments["group_size"]
    step = 32 // (4 if bits == 3 else bits)
    if rounded and site.stored("scales").shape[1] > 1 and size % step:
        return f"the kernel rounds activations in groups of whole steps of {step} columns"
    names, bias = ("qweight", "scales", "zero_points"), site.maybe_stored("bias")
    operands = site.stored("qweight"), site.stored("scales"), zeros
    packed = site.packed_once(names, lambda: pack_nbits(*operands, bits, columns))
    if rounded:
        return ByteLinear(packed, site.isa, "symmetric", bias)
    return NbitsLinear(packed, size, site.isa, bias, bfloat16=site.compute == "bfloat16")


def _dynamic(site: Site) -> Kernel | str:
    refusal = unsuitable(site, ("qweight", "scales", "bias")) or _too_wide(site)
    if refusal:
        return refusal
    if site.arguments["activation"] != "per_token":
        return "ranges of the whole tensor have no kernel; per token they have"
    return ByteLinear(_int8(site), site.isa, "shifted", site.maybe_stored("bias"))


def _static(site: Site) -> Kernel | str:
    refusal = unsuitable(site, ("qweight", "scales", "input_scales", "bias")) or _too_wide(site)
    if refusal:
        return refusal
    grid = site.stored("input_scales"), site.arguments["input_zero_point"]
    return ByteLinear(_int8(site), site.isa, "fixed", site.maybe_stored("bias"), *grid)


def _int8(site: Site) -> PackedLinear:
    names = ("qweight", "scales")
    return site.packed_once(names, lambda: pack_int8(site.stored("qweight"), site.stored("scales")))


LOWERINGS: dict[str, Lowering] = {
    "graphwright.linear_nbits": _nbits,
    "graphwright.linear_nbits_dynamic": _nbits_dynamic,
    "graphwright.linear_outliers": _outliers,
    "graphwright.linear_int8_dynamic": _dynamic,
    "graphwright.linear_int8_static": _static,
}
