"""Linears on the C++ kernels, as modules that stand in a lowered graph."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from graphwright.backends.cpu.packing import PackedLinear
from graphwright.ir.errors import BackendError


class ByteLinear(nn.Module):
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
            _floats(bias),
            rounding,
            _floats(input_scales),
            input_zero_point,
        )

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
        plain = x.detach() if x.dtype == torch.float32 else x.detach().to(torch.float32)
        # numpy's views cost a fraction of torch's, and one row of a small layer takes only a few microseconds.
        rows = np.ascontiguousarray(plain.numpy()).reshape(-1, self.packed.columns)
        result = np.empty((len(rows), self.packed.outputs), np.float32)
        self._kernel.run(rows, result, torch.get_num_threads())
        shaped = torch.from_numpy(result.reshape(*x.shape[:-1], self.packed.outputs))
        return shaped if x.dtype == torch.float32 else shaped.to(x.dtype)

    def extra_repr(self) -> str:
        """What ``print`` shows of it."""
        packed = self.packed
        return f"{packed.columns} -> {packed.outputs}, {packed.bits} bits, {self.rounding}, {self.isa}"


def _floats(values: torch.Tensor | None) -> npt.NDArray[np.float32] | None:
    return values.detach().to(torch.float32).contiguous().numpy() if values is not None else None
