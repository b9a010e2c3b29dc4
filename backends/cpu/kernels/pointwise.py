"""Activations, alone or as the gate of another value; sums, differences and products of two tensors."""

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
        number: ``other``, where it is none of the program's tensors.
    """

    inputs: tuple[str, ...] = ("self", "other")

    def __init__(self, isa: str, adds: bool, number: float | None = None) -> None:
        super().__init__()
        from graphwright.backends.cpu import _native  # not at the top: it may be absent

        combine = "add" if adds else "multiply"
        self._kernel = _native.Pointwise(isa, "", combine, number)
        self._number = number
        self.inputs = ("self", "other") if number is None else ("self",)
        self.label = f"{combine}{'' if number is None else f' {number:g}'} {self._kernel.isa}"

    def forward(self, x: torch.Tensor, other: torch.Tensor | None = None) -> torch.Tensor:
        """The combination, in the operands' dtype (that of the larger, where one is a single number); no gradients.

        Raises:
            BackendError: the operands are not floating tensors on the CPU, or neither has the result's shape.
        """
        expect_floats(self.label, x, other)
        if other is not None:
            shape = x.shape if x.shape == other.shape else torch.broadcast_shapes(x.shape, other.shape)
            if x.shape != shape:
                x, other = other, x
            if (x.dtype != other.dtype and other.dim() > 0) or x.shape != shape:
                raise BackendError(f"cannot combine {[*x.shape]} and {[*other.shape]}", where=self.label)
        elif self._number is None:
            raise BackendError("takes two tensors", where=self.label)
        result, order = result_like(x)
        if result.size > 0:
            columns, second = x.shape[-1 if order is None else order[-1]] if x.shape else 1, None
            if other is not None:
                columns, second = _aligned(floats(x), floats(other), order)
            rows, target = rows_of(floats(x), columns, order), rows_of(result, columns, order)
            self._kernel.run(rows, second, target, torch.get_num_threads())
        return tensor_like(result, x)

    def step(self, inputs: Sequence[Shape | None], result: Shape) -> Step | None:
        """Operands: one of the result's shape, and one of that shape, one row of it, a single number, or a number for
        each of its first axis, ``[B, 1, …]``."""
        if self._number is not None:
            return Step(self._kernel, (0, None))
        for x, other in ((0, 1), (1, 0)):
            shape = inputs[other]
            if inputs[x] == result and shape is not None and result:
                is_row = shape[-1:] == result[-1:] and all(size == 1 for size in shape[:-1])
                of_first = len(shape) == len(result) and all(size == 1 for size in shape[1:]) and shape[0] == result[0]
                if shape == result or is_row or of_first or all(size == 1 for size in shape):
                    return Step(self._kernel, (x, other))
        return None


class Difference(Kernel):
    """``self - other``, of one shape.

    Args:
        isa: instruction set of the kernel.
    """

    inputs = ("self", "other")

    def __init__(self, isa: str) -> None:
        super().__init__()
        from graphwright.backends.cpu import _native  # not at the top: it may be absent

        self._kernel = _native.Pointwise(isa, "", "subtract")
        self.label = f"subtract {self._kernel.isa}"

    def forward(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """The difference, in the operands' dtype; without gradients.

        Raises:
            BackendError: they are no floating tensors on the CPU, or not alike.
        """
        expect_floats(self.label, x, other)
        if (x.shape, x.dtype) != (other.shape, other.dtype):
            raise BackendError(f"cannot subtract {[*other.shape]} from {[*x.shape]}", where=self.label)
        result, order = result_like(x)
        if result.size > 0:
            columns = result.shape[-1 if order is None else order[-1]] if result.shape else 1
            rows, target = rows_of(floats(x), columns, order), rows_of(result, columns, order)
            self._kernel.run(rows, rows_of(floats(other), columns, order), target, torch.get_num_threads())
        return tensor_like(result, x)

    def step(self, inputs: Sequence[Shape | None], result: Shape) -> Step:
        """Operands: the two values."""
        return Step(self._kernel, (0, 1))


class LeakyRelu(Kernel):
    """What is above 0 stays, the rest is multiplied by a slope.

    Args:
        isa: instruction set of the kernel.
        slope: of what is not above 0.
    """

    inputs = ("self",)

    def __init__(self, isa: str, slope: float) -> None:
        super().__init__()
        from graphwright.backends.cpu import _native  # not at the top: it may be absent

        self._kernel = _native.Pointwise(isa, "", "slope", slope)
        self.label = f"leaky_relu {self._kernel.isa}"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of ``x``, in its dtype; without gradients.

        Raises:
            BackendError: it is no floating tensor on the CPU.
        """
        expect_floats(self.label, x)
        result, order = result_like(x)
        if result.size > 0:
            columns = result.shape[-1 if order is None else order[-1]] if result.shape else 1
            rows, target = rows_of(floats(x), columns, order), rows_of(result, columns, order)
            self._kernel.run(rows, None, target, torch.get_num_threads())
        return tensor_like(result, x)

    def step(self, inputs: Sequence[Shape | None], result: Shape) -> Step:
        """Operands: the values."""
        return Step(self._kernel, (0, None))


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
        nodes = [each for each in operands if isinstance(each, fx.Node)]
        kinds = [site.program.type_of(node) for node in nodes]
        result = site.program.type_of(site.node)
        if result not in kinds or site.arguments.get("alpha", 1) != 1:
            return None  # both are broadcast, or one is promoted
        if len(kinds) == 1 and operands[0] is nodes[0] and type(operands[1]) in (int, float):
            return None if unsuitable(site, "self") else Combination(site.isa, adds, float(operands[1]))
        # A tensor without dimensions takes the other's dtype, as a number does.
        dtypes = {kind.dtype for kind in kinds if isinstance(kind, TensorType) and (kind.shape or kind == result)}
        plain = len(kinds) == 2 and len(dtypes) == 1 and all(_is_floating(kind) for kind in kinds)
        return Combination(site.isa, adds) if plain and not unsuitable(site, "self") else None

    return lower


def _subtract(site: Site) -> Kernel | str | None:
    kinds = [
        site.program.type_of(each)
        for each in (site.arguments["self"], site.arguments["other"])
        if isinstance(each, fx.Node)
    ]
    alike = kinds == [site.program.type_of(site.node)] * 2
    if not alike or site.arguments.get("alpha", 1) != 1 or not _is_floating(kinds[0]):
        return None
    return unsuitable(site, "self") or Difference(site.isa)


def _is_floating(kind: object) -> bool:
    return isinstance(kind, TensorType) and kind.dtype.is_floating_point and kind.dtype != torch.float64


def _leaky_relu(site: Site) -> Kernel | str:
    return unsuitable(site, "self") or LeakyRelu(site.isa, float(site.arguments["negative_slope"]))


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
    "aten.leaky_relu": _leaky_relu,
    "aten.mul.Tensor": _combine(adds=False),
    **{f"aten.{name}": _plain(name) for name in ("relu", "sigmoid", "silu", "tanh")},
    "aten.sub.Tensor": _subtract,
    "graphwright.gated_activation": _gated,
}
