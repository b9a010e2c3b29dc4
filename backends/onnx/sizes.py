"""Sizes that vary from call to call: symbolic expressions over input dimensions as ONNX values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import onnx_ir as ir
import torch
from torch import fx

from graphwright.backends.onnx.graph import GraphBuilder
from graphwright.ir.errors import ExportError
from graphwright.ir.types import VAL

# A number, or an expression (of sympy, which torch uses) over the symbols of input dimensions.
Size: TypeAlias = Any
Sizes: TypeAlias = tuple[Size, ...]


def size_of(value: Any) -> Size:
    """A size as torch holds it, as a number or expression."""
    if isinstance(value, torch.SymInt):
        expression = value.node.expr
        return int(expression) if expression.is_number else expression
    return int(value)


def sizes_of(fake: torch.Tensor) -> Sizes:
    """The shape of a fake tensor."""
    return tuple(size_of(size) for size in fake.shape)


def product(sizes: Sequence[Size]) -> Size:
    """The product of sizes."""
    result: Size = 1
    for size in sizes:
        result = result * size
    return int(result) if isinstance(result, int) or result.is_number else result


class SizeTable:
    """Gives ONNX values for sizes, each computed once, from the shapes of the graph's inputs."""

    def __init__(self, graph: GraphBuilder) -> None:
        self._graph = graph
        self._sources: dict[Size, tuple[ir.Value, int]] = {}
        self._values: dict[Size, ir.Value] = {}
        self._vectors: dict[Sizes, ir.Value] = {}

    def add_input(self, value: ir.Value, sizes: Sizes) -> None:
        """Learn where dimensions can be read from."""
        for axis, size in enumerate(sizes):
            if not isinstance(size, int) and size.is_Symbol:
                self._sources.setdefault(size, (value, axis))

    def value(self, size: Size) -> ir.Value:
        """An int64 vector of one element.

        Raises:
            ExportError: the size depends on data, or on an operation ONNX has no integer form of.
        """
        if size not in self._values:
            scope, self._graph.scope = self._graph.scope, "sizes"
            self._values[size] = self._compute(size)
            self._graph.scope = scope
        return self._values[size]

    def scalar(self, size: Size) -> ir.Value:
        """An int64 scalar."""
        if isinstance(size, int):
            return self._graph.constant(size, torch.int64)
        return self._graph.call("Squeeze", self.value(size), self._graph.integers(0))

    def vector(self, sizes: Sizes) -> ir.Value:
        """An int64 vector, such as the operand of ``Reshape``."""
        if sizes not in self._vectors:
            self._vectors[sizes] = self._join(sizes)
        return self._vectors[sizes]

    def _join(self, sizes: Sizes) -> ir.Value:
        if all(isinstance(size, int) for size in sizes):
            return self._graph.integers(*[size for size in sizes if isinstance(size, int)])
        parts: list[ir.Value] = []
        numbers: list[int] = []
        for size in sizes:
            if isinstance(size, int):
                numbers.append(size)
                continue
            if numbers:
                parts.append(self._graph.integers(*numbers))
                numbers = []
            parts.append(self.value(size))
        if numbers:
            parts.append(self._graph.integers(*numbers))
        if len(parts) == 1:
            return parts[0]
        scope, self._graph.scope = self._graph.scope, "sizes"
        joined = self._graph.call("Concat", *parts, axis=0)
        self._graph.scope = scope
        return joined

    def _compute(self, size: Size) -> ir.Value:
        if isinstance(size, int) or size.is_Integer:
            return self._graph.integers(int(size))
        if size in self._sources:
            source, axis = self._sources[size]
            return self._graph.call("Shape", source, start=axis, end=axis + 1)
        if size.is_Add:
            return self._fold("Add", size.args)
        if size.is_Mul:
            return self._fold("Mul", size.args)
        name = type(size).__name__
        if name in ("FloorDiv", "CleanDiv", "IntTrueDiv"):
            return self._floor_divide(size.args[0], size.args[1])
        if name in ("Mod", "PythonMod"):
            return self._graph.call("Mod", self.value(size.args[0]), self.value(size.args[1]))
        if name == "Max":
            return self._fold("Max", size.args)
        if name == "Min":
            return self._fold("Min", size.args)
        if size.is_Pow and size.args[1].is_Integer and int(size.args[1]) > 0:
            return self._fold("Mul", [size.args[0]] * int(size.args[1]))
        raise ExportError(
            f"the size {size} cannot be computed from the input shapes in ONNX",
            hint="trace the model with this dimension fixed (dynamic=...)",
        )

    def _fold(self, op: str, parts: Sequence[Any]) -> ir.Value:
        values = [self.value(part) for part in parts]
        result = values[0]
        for value in values[1:]:
            result = self._graph.call(op, result, value)
        return result

    def _floor_divide(self, dividend: Any, divisor: Any) -> ir.Value:
        # ONNX Div rounds towards zero; without the remainder, which has the divisor's sign, both roundings agree.
        remainder = self._graph.call("Mod", self.value(dividend), self.value(divisor))
        return self._graph.call("Div", self._graph.call("Sub", self.value(dividend), remainder), self.value(divisor))


def size_argument(value: Any) -> Size | None:
    """An integer argument of a node: a number, or a node that computes a size; ``None`` for anything else."""
    if isinstance(value, fx.Node):
        fake = value.meta.get(VAL)
        return size_of(fake) if isinstance(fake, int | torch.SymInt) and not isinstance(fake, bool) else None
    return int(value) if isinstance(value, int) and not isinstance(value, bool) else None
