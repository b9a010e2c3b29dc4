"""Linears that compute in float32 or bfloat16: dense weights, and packed integers whose activations stay floats."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from graphwright.backends.cpu.kernels.base import Kernel, Lowering, Site, floats, stored_floats, tensor_like
from graphwright.backends.cpu.kernels.byte_packing import PANEL, STEP_BYTES, PackedLinear
from graphwright.ir.errors import BackendError

_STORED = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class PackedFloats:
    """Dense weights in the layout that the kernels stream (``csrc/float_linear_kernels.h``).

    Attributes:
        outputs, columns: of the matrix.
        bfloat16: whether values are bfloat16, or float32.
        values: uint8, flat, ``[panels, steps, 256]``.
    """

    outputs: int
    columns: int
    bfloat16: bool
    values: torch.Tensor

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
    panels, steps = -(-outputs // PANEL), -(-columns // 2) if bfloat16 else columns
    values = torch.empty(panels * steps * STEP_BYTES, dtype=torch.uint8)
    stored, threads = weight.detach().contiguous(), torch.get_num_threads()
    if bfloat16 and stored.dtype == torch.bfloat16:
        _native.pack_bfloat16(stored.view(torch.int16).numpy().view(np.uint16), values.numpy(), threads)
    else:
        _native.pack_floats(stored.to(torch.float32).numpy(), bfloat16, values.numpy(), threads)
    return PackedFloats(outputs, columns, bfloat16, values)


class FloatLinear(Kernel):
    """``x Wᵀ + b`` on dense weights, with float32 sums.

    Args:
        packed: the weights. Where they are bfloat16, activations are rounded to it.
        isa: instruction set of the kernel.
        bias: ``[out]`` or ``None``.
        note: what to say of the weights' rounding.
    """

    inputs = ("input",)

    def __init__(self, packed: PackedFloats, isa: str, bias: torch.Tensor | None = None, note: str = "") -> None:
        super().__init__()
        from graphwright.backends.cpu import _native  # not at the top: it may be absent

        self.packed = packed
        self._kernel = _native.FloatLinear(
            isa, packed.outputs, packed.columns, packed.bfloat16, packed.values.numpy(), stored_floats(bias)
        )
        self.label = f"float_linear {self.isa}, {note or ('bfloat16' if packed.bfloat16 else 'float32')}"

    @property
    def isa(self) -> str:
        """The instruction set of the kernel: one that has none of its own takes its parent's."""
        return self._kernel.isa

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., in]``, floating, of any strides, to ``[..., out]`` of the same dtype; without a gradient.

        Raises:
            BackendError: the input is not a floating tensor on the CPU with that many features.
        """
        rows = _rows_of(x, self.packed.columns)
        result = np.empty((len(rows), self.packed.outputs), np.float32)
        self._kernel.run(rows, result, torch.get_num_threads())
        return tensor_like(result.reshape(*x.shape[:-1], self.packed.outputs), x)

    def extra_repr(self) -> str:
        """What ``print`` shows of it."""
        packed = self.packed
        return f"{packed.columns} -> {packed.outputs}, {'bfloat16' if packed.bfloat16 else 'float32'}, {self.isa}"


class NbitsLinear(Kernel):
    """``linear_nbits`` in floats: the weights stay packed.

    Args:
        packed: the weights.
        group_size: columns of a group.
        isa: instruction set of the kernel.
        bias: ``[out]`` or ``None``.
        bfloat16: weights and activations may be rounded to bfloat16. They are where that is faster: with enough rows,
            on instruction sets that multiply it.
    """

    inputs = ("x",)

    def __init__(
        self,
        packed: PackedLinear,
        group_size: int,
        isa: str,
        bias: torch.Tensor | None = None,
        *,
        bfloat16: bool = False,
    ) -> None:
        super().__init__()
        from graphwright.backends.cpu import _native  # not at the top: it may be absent

        self.packed = packed
        self._kernel = _native.NbitsLinear(
            isa,
            packed.outputs,
            packed.columns,
            packed.bits,
            group_size,
            bfloat16,
            packed.codes.numpy(),
            packed.scales.numpy(),
            packed.zeros.numpy() if packed.zeros is not None else None,
            stored_floats(bias),
        )
        exact = self._kernel.exact_rows
        self.compute = "float32"
        if exact is not None:
            self.compute = f"weights and activations rounded to bfloat16 beyond {exact} rows"
        self.label = f"nbits_linear {self.isa}, {packed.bits}-bit weights, {self.compute}"

    @property
    def isa(self) -> str:
        """The instruction set of the kernel: one that has none of its own takes its parent's."""
        return self._kernel.isa

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., in]``, floating, of any strides, to ``[..., out]`` of the same dtype; without a gradient.

        Raises:
            BackendError: the input is not a floating tensor on the CPU with that many features.
        """
        rows = _rows_of(x, self.packed.columns)
        result = np.empty((len(rows), self.packed.outputs), np.float32)
        self._kernel.run(rows, result, torch.get_num_threads())
        return tensor_like(result.reshape(*x.shape[:-1], self.packed.outputs), x)

    def extra_repr(self) -> str:
        """What ``print`` shows of it."""
        packed = self.packed
        return f"{packed.columns} -> {packed.outputs}, {packed.bits} bits, {self.compute}, {self.isa}"


def _rows_of(x: torch.Tensor, columns: int) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    if not x.is_floating_point() or x.device.type != "cpu" or x.dim() == 0 or x.shape[-1] != columns:
        raise BackendError(
            f"takes floating CPU tensors of {columns} features, not {x.dtype} {list(x.shape)} on {x.device}",
            where="linear kernel",
        )
    return np.ascontiguousarray(floats(x)).reshape(-1, columns)


def _dense(site: Site) -> Kernel | str:
    if any(not site.is_stored(name) for name in ("weight", "bias") if site.arguments[name] is not None):
        return "its weights are computed, not stored"
    weight, bias = site.stored("weight"), site.maybe_stored("bias")
    if torch.float64 in (weight.dtype, site.value("input").dtype):
        return "the kernels compute in float32"
    if weight.dtype not in _STORED or weight.dim() != 2 or weight.numel() == 0:
        return f"the kernels have no {weight.dtype} weights of shape {list(weight.shape)}"
    if weight.dtype == torch.bfloat16:
        note = "bfloat16 weights and activations"
        return FloatLinear(pack_floats(weight, bfloat16=True), site.isa, bias, note)
    if site.compute == "bfloat16":
        note = "weights and activations rounded to bfloat16"
        return FloatLinear(pack_floats(weight, bfloat16=True), site.isa, bias, note)
    return FloatLinear(pack_floats(weight), site.isa, bias)


LOWERINGS: dict[str, Lowering] = {"aten.linear": _dense}
