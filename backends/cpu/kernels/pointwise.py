"""Activations, alone or as the gate of another value; sums and products of two tensors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import fx

from graphwright.backends.cpu.kernels.base import Kernel, Lowering, Shape, Site, Step, floats, tensor_like
from graphwright.backends.cpu.kernels.layout import Floats, expect_floats, result_like, rows_of, unsuitable
from graphwright.ir.errors import BackendError
from graphwright.ir.types import TensorType

FUNCTIONS = ("gelu", "gelu_tanh", "relu", "sigmoid", "silu", "tanh")


class Activation(Kernel):
    """An activation, value by value.

    Args:
        isa: instruction set of the kernel.
        function: one of :data:`FUNCTIONS`.
    """

    inputs: tuple[str, ...] = ("self",)

    def __init__(self, isa: str, function: str) -> None:
        super().__init__()
        from graphwright.backends.cpu import _native  # not at the top: it may be absent

        self._kernel = _native.Pointwise(isa, function)
        self.label = f"{function} {self._kernel.isa}"

    def forward(self, x: torch.Tensor, up: torch.Tensor | None = None) -> torch.Tensor:
        """``function(x)``, times ``up`` where it is given, in ``x``'s dtype; without gradients.

        Raises:
            BackendError: they are not floating tensors on the CPU, or differ in shape.
        """
        expect_floats(self.label, x, up)
        if up is not None and up.shape != x.shape:
            raise BackendError(f"takes tensors of one shape, not {[*x.shape]} and {[*up.shape]}", where=self.label)
        result, order = result_like(x)
        if result.size > 0:
            columns = result.shape[-1 if order is None else order[-1]] if result.shape else 1
            factor = None if up is None else rows_of(floats(up), columns, order)
            rows, target = rows_of(floats(x), columns, order), rows_of(result, columns, order)
            self._kernel.run(rows, factor, target, torch.get_num_threads())
        return tensor_like(result, x)

    def step(self, inputs: Sequence[Shape | None], result: Shape) -> Step:
        """Operands: the values, and what their activation is multiplied by."""
        return Step(self._kernel, (0, 1))


class GatedActivation(Activation):
    """``function(gate) * up``; the two may be halves of one buffer."""

    inputs = ("gate", "up")

    def __init__(self, isa: str, function: str) -> None:
        super().__init__(isa, function)
        self.label = f"gated {self.label}"


class Combination(Kernel):
    """``self + other`` or ``self * other``, either of which may be broadcast to the other's shape.

    Args:
        isa: instruction set of the kernel.
        adds: add, or multiply.
    """

    inputs = ("self", "other")

    def __init__(self, isa: str, adds: bool) -> None:
        super().__init__()
        from graphwright.backends.cpu import _native  # not at the top: it may be absent

        self._kernel = _native.Pointwise(isa, "", adds)
        self.label = f"{'add' if adds else 'multiply'} {self._kernel.isa}"

    def forward(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """The sum or product, in the operands' dtype; without gradients.

        Raises:
            BackendError: they are not floating tensors on the CPU, or neither has the result's shape.
        """
        expect_floats(self.label, x, other)
        shape = x.shape if x.shape == other.shape else torch.broadcast_shapes(x.shape, other.shape)
        if x.shape != shape:
            x, other = other, x
        if x.dtype != other.dtype or x.shape != shape:
            raise BackendError(f"cannot combine {[*x.shape]} and {[*other.shape]}", where=self.label)
        result, order = result_like(x)
        if result.size > 0:
            columns, second = _aligned(floats(x), floats(other), order)
            rows, target = rows_of(floats(x), columns, order), rows_of(result, columns, order)
            self._kernel.run(rows, second, target, torch.get_num_threads())
        return tensor_like(result, x)

    def step(self, inputs: Sequence[Shape | None], result: Shape) -> Step | None:
        """Operands: one of the result's shape, and one of that shape or that is one row of it."""
        for x, other in ((0, 1), (1, 0)):
            shape = inputs[other]
            if inputs[x] == result and shape is not None and shape:
                is_row = shape[-1] == result[-1] and all(size == 1 for size in shape[:-1])
                if shape == result or is_row:
                    return Step(self._kernel, (x, other))
        return None


def _aligned(x: Floats, other: Floats, order: tuple[int, ...] | None) -> tuple[int, Floats]:
    """The columns of a row, and the second operand as rows: one, over and over, where leading dimensions repeat it."""
    shape = other.shape[next((i for i, size in enumerate(other.shape) if size != 1), other.ndim) :]
    if order is None and 0 < len(shape) < x.ndim and x.shape[-len(shape) :] == shape:
        columns = other.size
        return columns, np.broadcast_to(other.reshape(1, columns), (x.size // columns, columns))
    columns = x.shape[-1 if order is None else order[-1]] if x.shape else 1
    return columns, rows_of(np.broadcast_to(other, x.shape), columns, order)


def _combine(adds: bool) -> Lowering:
    def lower(site: Site) -> Kernel | str | None:
        operands = [site.arguments[name] for name in ("self", "other")]
        kinds = [site.program.type_of(node) for node in operands if isinstance(node, fx.Node)]
        result = site.program.type_of(site.node)
        plain = len(kinds) == 2 and result in kinds and site.arguments.get("alpha", 1) == 1
        if not plain or len({kind.dtype for kind in kinds if isinstance(kind, TensorType)}) != 1:
            return None  # a number, or both are broadcast, or one is promoted
        return Combination(site.isa, adds) if not unsuitable(site, "self") else None

    return lower


def _plain(function: str) -> Lowering:
    return lambda site: unsuitable(site, "self") or Activation(site.isa, function)


def _gelu(site: Site) -> Kernel | str:
    function = "gelu_tanh" if site.arguments["approximate"] == "tanh" else "gelu"
    return unsuitable(site, "self") or Activation(site.isa, function)


def _gated(site: Site) -> Kernel | str:
    refusal = unsuitable(site, "gate") or unsuitable(site, "up")
    if not refusal and site.value("gate").shape != site.value("up").shape:
        refusal = "gate and up differ in shape"
    return refusal or GatedActivation(site.isa, site.arguments["activation"])


LOWERINGS: dict[str, Lowering] = {
    "aten.add.Tensor": _combine(adds=True),
    "aten.gelu": _gelu,
    "aten.mul.Tensor": _combine(adds=False),
    **{f"aten.{name}": _plain(name) for name in ("relu", "sigmoid", "silu", "tanh")},
    "graphwright.gated_activation": _gated,
}
