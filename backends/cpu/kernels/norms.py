"""Layer and root-mean-square normalisation, alone or of a sum."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from graphwright.backends.cpu.kernels.base import (
    Kernel,
    Lowering,
    Shape,
    Site,
    Step,
    floats,
    stored_floats,
    tensor_like,
)
from graphwright.backends.cpu.kernels.layout import Floats, expect_floats, result_like, rows_of, unsuitable
from graphwright.ir.errors import BackendError


class _Norm(Kernel):
    """What both norms share.

    Args:
        isa: instruction set of the kernel.
        centred: whether the mean is taken away first.
        shape: of the trailing dimensions that are one row; ``None`` for the last, of any size.
        weight, bias: of that shape, or ``None``.
        eps: added to the mean square.
        residual: whether it is called with a second tensor, which is added first; it then gives the sum as well.
    """

    _name: str

    def __init__(
        self,
        isa: str,
        centred: bool,
        shape: Sequence[int] | None,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        eps: float,
        residual: bool,
    ) -> None:
        super().__init__()
        from graphwright.backends.cpu import _native  # not at the top: it may be absent

        self._kernel = _native.Norm(isa, centred, _flat(weight), _flat(bias), eps)
        self._shape, self._centred = None if shape is None else tuple(shape), centred
        self._columns = None if shape is None else math.prod(shape)
        self.residual = residual
        self.label = f"{'add + ' if residual else ''}{self._name} {self._kernel.isa}"

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """The norm of ``x``, or that of ``x + residual`` and the sum, in ``x``'s dtype; without gradients.

        Raises:
            BackendError: they are not floating tensors on the CPU, or do not fit each other or the weight.
        """
        expect_floats(self._name, x, residual)
        if self._shape is not None and x.shape[-len(self._shape) :] != self._shape:
            raise BackendError(f"normalises {[*self._shape]}, not {[*x.shape]}", where=f"{self._name} kernel")
        if self.residual != (residual is not None) or (residual is not None and residual.shape != x.shape):
            raise BackendError("takes a residual of x's shape where it was made for one", where=f"{self._name} kernel")
        # PyTorch's layer norm gives contiguous results; the reference of the other keeps the order of memory.
        result, order = (np.empty(x.shape, np.float32), None) if self._centred else result_like(x)
        if order is not None and order[-1] != x.dim() - 1:
            found = self(x.contiguous(), residual)
            if residual is None:
                return torch.empty_like(x).copy_(found)
            return torch.empty_like(x).copy_(found[0]), torch.empty_like(x).copy_(found[1])
        total = None if residual is None else np.empty_like(result)
        if result.size > 0:
            columns = x.shape[-1] if self._columns is None else self._columns
            rows, target = rows_of(floats(x), columns, order), rows_of(result, columns, order)
            added = None if residual is None else rows_of(floats(residual), columns, order)
            sums = None if total is None else rows_of(total, columns, order)
            self._kernel.run(rows, added, target, sums, torch.get_num_threads())
        return tensor_like(result, x) if total is None else (tensor_like(result, x), tensor_like(total, x))

    def step(self, inputs: Sequence[Shape | None], result: Shape) -> Step | None:
        """Operands: the rows and what is added to them; the norm, and the sum."""
        return None if self._shape is not None and len(self._shape) > 1 else Step(self._kernel, (0, 1), 2)


def _flat(values: torch.Tensor | None) -> Floats | None:
    return None if values is None else stored_floats(values.reshape(-1))


class LayerNorm(_Norm):
    """``(x - mean) / sqrt(variance + eps) * weight + bias`` over the trailing dimensions.

    Args:
        isa: instruction set of the kernel.
        shape: of the dimensions that are normalised.
        weight, bias: of that shape, or ``None``.
        eps: added to the variance.
        residual: whether it is called as ``kernel(x, residual)`` and gives ``(norm(x + residual), x + residual)``.
    """

    inputs = ("input",)
    _name = "layer_norm"

    def __init__(
        self,
        isa: str,
        shape: Sequence[int],
        weight: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        eps: float = 1e-5,
        residual: bool = False,
    ) -> None:
        super().__init__(isa, True, shape, weight, bias, eps, residual)

    def with_residual(self) -> LayerNorm:
        """The same for a sum."""
        return LayerNorm(**{**self.given, "residual": True})


class RmsNorm(_Norm):
    """``x / sqrt(mean(x²) + eps) * weight`` over the last dimension.

    Args:
        isa: instruction set of the kernel.
        weight: ``[columns]`` or ``None``.
        eps: added to the mean square.
        residual: whether it is called as ``kernel(x, residual)`` and gives ``(norm(x + residual), x + residual)``.
    """

    inputs = ("x",)
    _name = "rms_norm"

    def __init__(self, isa: str, weight: torch.Tensor | None = None, eps: float = 1e-6, residual: bool = False) -> None:
        super().__init__(isa, False, None if weight is None else weight.shape, weight, None, eps, residual)

    def with_residual(self) -> RmsNorm:
        """The same for a sum."""
        return RmsNorm(**{**self.given, "residual": True})


def _layer_norm(site: Site) -> Kernel | str:
    refusal = unsuitable(site, "input", ("weight", "bias"))
    if refusal:
        return refusal
    shape = site.arguments["normalized_shape"]
    if not all(isinstance(size, int) for size in shape):
        return "the size of what it normalises is not known"
    parameters = site.maybe_stored("weight"), site.maybe_stored("bias")
    return LayerNorm(site.isa, shape, *parameters, site.arguments["eps"])


def _rms_norm(site: Site) -> Kernel | str:
    refusal = unsuitable(site, "x", ("weight",))
    return refusal or RmsNorm(site.isa, site.maybe_stored("weight"), site.arguments["eps"])


LOWERINGS: dict[str, Lowering] = {"aten.layer_norm": _layer_norm, "graphwright.rms_norm": _rms_norm}
