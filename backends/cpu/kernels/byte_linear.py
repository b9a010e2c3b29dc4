"""Linears on packed integer weights whose activations are rounded to 8 bits."""

from __future__ import annotations

import numpy as np
import torch

from graphwright.backends.cpu.kernels.base import Kernel, Lowering, Site, floats, stored_floats, tensor_like
from graphwright.backends.cpu.kernels.byte_packing import PackedLinear, pack_int8, pack_nbits
from graphwright.backends.cpu.kernels.float_linear import NbitsLinear
from graphwright.ir.errors import BackendError

# The kernels' sums are int32.
_MOST_COLUMNS = 32768


class ByteLinear(Kernel):
    """``x W + b`` on packed integer weights; activations are rounded to 8 bits in the kernel.

    Args:
        packed: the weights.
        isa: instruction set of the kernel.
        rounding: of the activations: ``symmetric`` (a scale for each row and group, as it comes), ``shifted`` (a scale
            and zero point for each row) or ``fixed`` (``input_scales`` and ``input_zero_point``).
        bias: ``[out]`` or ``None``.
        input_scales: ``[in]``, for ``fixed``.
        input_zero_point: in 0..255, for ``fixed``.
    """

    inputs = ("x",)

    def __init__(
        self,
        packed: PackedLinear,
        isa: str,
        rounding: str,
        bias: torch.Tensor | None = None,
        input_scales: torch.Tensor | None = None,
        input_zero_point: int = 0,
    ) -> None:
        super().__init__()
        from graphwright.backends.cpu import _native  # not at the top: it may be absent

        self.packed, self.rounding = packed, rounding
        self._kernel = _native.ByteLinear(
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
        self.label = f"byte_linear {self.isa}, {packed.bits}-bit weights, activations rounded to int8 ({rounding})"

    @property
    def isa(self) -> str:
        """The instruction set of the kernel: one that has none of its own takes its parent's."""
        return self._kernel.isa

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., in]``, floating, of any strides, to ``[..., out]`` of the same dtype; without a gradient.

        Raises:
            BackendError: the input is not a floating tensor on the CPU with that many features.
        """
        if not x.is_floating_point() or x.device.type != "cpu" or x.dim() == 0 or x.shape[-1] != self.packed.columns:
            raise BackendError(
                f"takes floating CPU tensors of {self.packed.columns} features, not {x.dtype} {list(x.shape)} on "
                f"{x.device}",
                where="linear kernel",
            )
        rows = np.ascontiguousarray(floats(x)).reshape(-1, self.packed.columns)
        result = np.empty((len(rows), self.packed.outputs), np.float32)
        self._kernel.run(rows, result, torch.get_num_threads())
        return tensor_like(result.reshape(*x.shape[:-1], self.packed.outputs), x)

    def extra_repr(self) -> str:
        """What ``print`` shows of it."""
        packed = self.packed
        return f"{packed.columns} -> {packed.outputs}, {packed.bits} bits, {self.rounding}, {self.isa}"


def unsuitable(site: Site, weights: tuple[str, ...]) -> str:
    """Why a linear cannot be packed, or an empty string."""
    if any(not site.is_stored(name) for name in weights if site.arguments[name] is not None):
        return "its weights are computed, not stored"
    if site.value("x").dtype == torch.float64:
        return "the kernels compute in float32"
    return ""


def _too_wide(site: Site) -> str:
    wide = site.value("x").shape[-1] > _MOST_COLUMNS
    return f"it has more than {_MOST_COLUMNS} input features" if wide else ""


def _nbits(site: Site) -> Kernel | str:
    rounded = site.compute == "int8"
    refusal = unsuitable(site, ("qweight", "scales", "zero_points", "bias")) or (_too_wide(site) if rounded else "")
    if refusal:
        return refusal
    columns, bits, size = int(site.value("x").shape[-1]), site.arguments["bits"], site.arguments["group_size"]
    qweight, scales, bias = site.stored("qweight"), site.stored("scales"), site.maybe_stored("bias")
    if rounded and scales.shape[1] > 1 and size % (32 // bits):
        return f"the kernel rounds activations in groups of whole steps of {32 // bits} columns"
    packed = pack_nbits(qweight, scales, site.maybe_stored("zero_points"), bits, columns)
    if rounded:
        return ByteLinear(packed, site.isa, "symmetric", bias)
    return NbitsLinear(packed, size, site.isa, bias, bfloat16=site.compute == "bfloat16")


def _dynamic(site: Site) -> Kernel | str:
    refusal = unsuitable(site, ("qweight", "scales", "bias")) or _too_wide(site)
    if refusal:
        return refusal
    if site.arguments["activation"] != "per_token":
        return "ranges of the whole tensor have no kernel; per token they have"
    packed = pack_int8(site.stored("qweight"), site.stored("scales"))
    return ByteLinear(packed, site.isa, "shifted", site.maybe_stored("bias"))


def _static(site: Site) -> Kernel | str:
    refusal = unsuitable(site, ("qweight", "scales", "input_scales", "bias")) or _too_wide(site)
    if refusal:
        return refusal
    packed = pack_int8(site.stored("qweight"), site.stored("scales"))
    grid = site.stored("input_scales"), site.arguments["input_zero_point"]
    return ByteLinear(packed, site.isa, "fixed", site.maybe_stored("bias"), *grid)


LOWERINGS: dict[str, Lowering] = {
    "graphwright.linear_nbits": _nbits,
    "graphwright.linear_int8_dynamic": _dynamic,
    "graphwright.linear_int8_static": _static,
}
