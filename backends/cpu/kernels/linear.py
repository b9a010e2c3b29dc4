"""What linear kernels have in common: rows in, rows out, and an epilogue before they are written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from graphwright.backends.cpu.kernels.base import Kernel, Shape, Site, Step, floats, tensor_like
from graphwright.ir.errors import BackendError

# From so many values on results are aligned, as storing past the caches wants it (csrc/linear_output.h).
_LARGE = 1 << 20


class Linear(Kernel):
    """``activation(x Wᵀ + b) * factor + residual``, each part but the product optional.

    Attributes:
        columns: input features.
        outputs: output features.
        activation: empty, or a name of ``_native``'s ``run``; set by the lowering when it takes an activation in.
    """

    inputs = ("x",)
    settings = ("activation",)

    def __init__(self, kernel: Any, columns: int, outputs: int, label: str) -> None:
        super().__init__()
        self._kernel = kernel
        self.columns, self.outputs, self.label, self.activation = columns, outputs, label, ""

    @property
    def isa(self) -> str:
        """The instruction set of the kernel: one that has none of its own takes its parent's."""
        isa: str = self._kernel.isa
        return isa

    def forward(
        self, x: torch.Tensor, factor: torch.Tensor | None = None, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``[..., in]``, floating, of any strides, to ``[..., out]`` of the same dtype; without a gradient.

        Args:
            x: the input.
            factor: of the output's shape, or of its last dimension alone.
            residual: likewise.

        Raises:
            BackendError: the input is not a floating tensor on the CPU with that many features, or ``factor`` or
                ``residual`` has another shape.
        """
        if not x.is_floating_point() or x.device.type != "cpu" or x.dim() == 0 or x.shape[-1] != self.columns:
            raise BackendError(
                f"takes floating CPU tensors of {self.columns} features, not {x.dtype} {list(x.shape)} on {x.device}",
                where="linear kernel",
            )
        rows = np.ascontiguousarray(floats(x)).reshape(-1, self.columns)
        result = _result(len(rows), self.outputs)
        if factor is None and residual is None:
            self._kernel.run(rows, result, torch.get_num_threads(), self.activation)
        else:
            extra = self._rows(factor, x), self._rows(residual, x)
            self._kernel.run(rows, result, torch.get_num_threads(), self.activation, *extra)
        return tensor_like(result.reshape(*x.shape[:-1], self.outputs), x)

    def step(self, inputs: Sequence[Shape | None], result: Shape) -> Step:
        """Operands: the rows, factor and residual."""
        self._kernel.activation = self.activation
        return Step(self._kernel, (0, 1, 2))

    def _rows(self, other: torch.Tensor | None, x: torch.Tensor) -> npt.NDArray[np.float32] | None:
        if other is None:
            return None
        is_row = other.shape == (self.outputs,)
        fits = is_row or (other.shape[:-1] == x.shape[:-1] and other.shape[-1:] == (self.outputs,))
        if not fits or not other.is_floating_point():
            raise BackendError(
                f"gives {[*x.shape[:-1], self.outputs]}, which {other.dtype} {list(other.shape)} does not fit",
                where="linear kernel",
            )
        values = floats(other)
        if is_row:
            return np.ascontiguousarray(values).reshape(1, self.outputs)
        rows = values.reshape(-1, self.outputs) if values.size else np.empty((x.shape[:-1].numel(), self.outputs), "f4")
        return rows if rows.strides[-1] == rows.itemsize else np.ascontiguousarray(rows)

    def extra_repr(self) -> str:
        """What ``print`` shows of it."""
        return f"{self.columns} -> {self.outputs}, {self.label}"


def _result(rows: int, outputs: int) -> npt.NDArray[np.float32]:
    if rows * outputs < _LARGE:
        return np.empty((rows, outputs), np.float32)
    aligned: npt.NDArray[np.float32] = torch.empty(rows, outputs).numpy()
    return aligned


def unsuitable(site: Site, weights: tuple[str, ...], x: str = "x") -> str:
    """Why a linear cannot be packed, or an empty string."""
    if any(not site.is_stored(name) for name in weights if site.arguments[name] is not None):
        return "its weights are computed, not stored"
    if site.value(x).dtype == torch.float64:
        return "the kernels compute in float32"
    return ""
