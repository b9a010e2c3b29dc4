"""Walking a program and emitting ONNX: the state shared by all translations."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import from_torch_dtype
from torch import fx

from graphwright.backends.onnx.elements import Elements, rows_of
from graphwright.backends.onnx.graph import GraphBuilder
from graphwright.backends.onnx.options import ExportOptions
from graphwright.backends.onnx.sizes import Size, Sizes, SizeTable, size_argument, sizes_of
from graphwright.backends.onnx.translations import TRANSLATIONS
from graphwright.ir.arguments import arguments_of
from graphwright.ir.errors import ExportError
from graphwright.ir.names import op_name
from graphwright.ir.program import Program
from graphwright.ir.provenance import path_of
from graphwright.ir.types import VAL, TensorType


@dataclass(frozen=True)
class QuantizedLinear:
    """A linear that must run on quantised weights.

    Attributes:
        node: name in the program.
        path: module path.
        op: operator in the program.
        kernel: the runtime operator expected to run it, such as ``MatMulNBits``.
        values: ONNX values that hold its result or its bare product; at least one survives in the runtime's
            optimised graph.
    """

    node: str
    path: str
    op: str
    kernel: str
    values: tuple[ir.Value, ...]

    @property
    def value_names(self) -> frozenset[str]:
        """Names of the values, as they are in the file."""
        return frozenset(str(value.name) for value in self.values)


class Lowering:
    """Translates the nodes of one program.

    Translations read operands by :meth:`tensor` or :meth:`elements` and set results by :meth:`set` or
    :meth:`set_elements`; what they emit goes through :attr:`graph`.
    """

    def __init__(self, program: Program, options: ExportOptions) -> None:
        self.program = program
        self.options = options
        self.graph = GraphBuilder()
        self.sizes = SizeTable(self.graph)
        self.quantized: list[QuantizedLinear] = []
        self.inputs: list[ir.Value] = []
        self._elements: dict[fx.Node, Elements] = {}
        self._tuples: dict[fx.Node, list[Elements]] = {}
        self._cache: dict[Hashable, Any] = {}

    # -- the walk ------------------------------------------------------------------------------------------------------

    def run(self, output_names: Sequence[str]) -> list[ir.Value]:
        """Emit the whole program; gives the graph's outputs under the given names.

        Raises:
            ExportError: an operator has no translation, or not for these operands; names node and module path.
        """
        self.add_inputs()
        needed = _needed(self.program)
        for node in self.program.nodes:
            if node.op == "call_function" and node in needed:
                self._translate(node)
        self.graph.scope = ""
        return self.outputs(output_names)

    def add_inputs(self) -> None:
        """Make the graph's inputs, and what stands for the program's."""
        for node in self.program.inputs:
            self._add_input(node)

    def outputs(self, output_names: Sequence[str]) -> list[ir.Value]:
        """The graph's outputs, under the given names."""
        outputs: list[ir.Value] = []
        for name, item in zip(output_names, _results(self.program), strict=True):
            value = self._output(item)
            if value.producer() is None or value in outputs:
                value = self.graph.call("Identity", value)
            value.name = self.graph.unique(name)
            self._describe(value, item)
            outputs.append(value)
        return outputs

    def _describe(self, value: ir.Value, item: Any) -> None:
        kind = self.program.type_of(item) if isinstance(item, fx.Node) else None
        if isinstance(kind, TensorType):
            value.type = ir.TensorType(from_torch_dtype(kind.dtype))
            value.shape = ir.Shape(list(kind.shape))
        elif value.type is None:
            value.type = ir.TensorType(ir.DataType.INT64)
            value.shape = ir.Shape([])

    def _add_input(self, node: fx.Node) -> None:
        kind = self.program.type_of(node)
        if not isinstance(kind, TensorType):
            raise ExportError(f"the input is {kind}, ONNX takes tensors", where=f"input {node.target!r}")
        value = self.graph.input(self.program.signature.keyword_of(str(node.target)), kind.dtype, kind.shape)
        self.inputs.append(value)
        self.sizes.add_input(value, self.shape(node))
        self.set(node, value)

    def _translate(self, node: fx.Node) -> None:
        if not isinstance(node.meta.get(VAL), torch.Tensor | tuple | list):
            return  # sizes are computed from the input shapes where they are needed
        name = op_name(node)
        if name == "py.getitem":
            source, index = node.args
            assert isinstance(source, fx.Node)
            assert isinstance(index, int)
            self._elements[node] = self._tuples[source][index]
            return
        where = TRANSLATIONS.get(name)
        if where is None:
            raise self.refuse(node, f"the operator {name} has no ONNX translation")
        module, function = where.split(":")
        translate: Callable[..., None] = getattr(
            importlib.import_module(f"graphwright.backends.onnx.translations.{module}"), function
        )
        self.graph.scope = path_of(node)
        translate(self, node, *arguments_of(node).values())

    def _output(self, item: Any) -> ir.Value:
        if isinstance(item, fx.Node):
            size = size_argument(item)
            return self.tensor(item) if size is None else self.sizes.scalar(size)
        if isinstance(item, bool | int | float):
            return self.graph.constant(item)
        raise ExportError(f"an output of the program is {item!r}, ONNX gives tensors", where="output")

    def refuse(self, node: fx.Node, what: str, hint: str | None = None) -> ExportError:
        """The error for a node that cannot be translated."""
        operands = [f"%{source.name} : {self.program.type_of(source)}" for source in node.all_input_nodes]
        place = path_of(node) or self.program.title
        return ExportError(what, where=f"%{node.name} in {place}", hint=hint, context=[f"{op_name(node)}", *operands])

    def expect(self, node: fx.Node, kernel: str, values: Sequence[ir.Value]) -> None:
        """Note that a linear must run on quantised weights."""
        self.quantized.append(QuantizedLinear(node.name, path_of(node), op_name(node), kernel, tuple(values)))

    # -- types ---------------------------------------------------------------------------------------------------------

    def shape(self, node: fx.Node) -> Sizes:
        """The shape of a node's value."""
        return sizes_of(node.meta[VAL])

    def dtype(self, node: fx.Node) -> torch.dtype:
        """The dtype of a node's value."""
        dtype: torch.dtype = node.meta[VAL].dtype
        return dtype

    def size(self, node: fx.Node, value: Any) -> Size:
        """An integer argument as a size.

        Raises:
            ExportError: it is neither a number nor a size.
        """
        size = size_argument(value)
        if size is None:
            raise self.refuse(node, f"the integer argument {value!r} depends on data")
        return size

    # -- operands ------------------------------------------------------------------------------------------------------

    def elements(self, node: fx.Node) -> Elements:
        """The elements of a node's value; weights become initialisers."""
        if node not in self._elements:
            if node.op != "get_attr":
                raise self.refuse(node, "the value is used but was not computed")
            name = str(node.target)
            value = self.graph.weight(name, self.program.tensor(node))
            self._elements[node] = Elements.of(self.graph, self.sizes, self.shape(node), value)
        return self._elements[node]

    def is_computed(self, node: fx.Node) -> bool:
        """Whether a node has a value so far."""
        return node in self._elements

    def tensor(self, node: fx.Node, dtype: torch.dtype | None = None) -> ir.Value:
        """A node's value in its own shape, cast when another dtype is wanted."""
        return self.cast(self.elements(node).get(self.shape(node)), self.dtype(node), dtype)

    def rows(self, node: fx.Node) -> ir.Value:
        """A node's value as ``[rows, last]``."""
        shape = rows_of(self.shape(node))
        if shape is None:
            raise self.refuse(node, "the last dimension varies from call to call")
        return self.elements(node).get(shape)

    def operand(self, value: Any, dtype: torch.dtype) -> ir.Value:
        """An argument that is a tensor, a number or a size, in its own shape, as this dtype."""
        if isinstance(value, fx.Node) and isinstance(value.meta.get(VAL), torch.Tensor):
            return self.tensor(value, dtype)
        size = size_argument(value)
        if size is not None and not isinstance(size, int):
            return self.cast(self.sizes.scalar(size), torch.int64, dtype)
        if isinstance(value, fx.Node):
            raise self.refuse(value, "a number computed from data cannot be an operand")
        return self.graph.constant(value, dtype)

    def cast(self, value: ir.Value, source: torch.dtype, target: torch.dtype | None) -> ir.Value:
        """The value as another dtype."""
        if target is None or source == target:
            return value
        made: ir.Value = self.once(("cast", value, target), lambda: self._cast(value, target))
        return made

    def _cast(self, value: ir.Value, target: torch.dtype) -> ir.Value:
        return self.graph.call("Cast", value, to=from_torch_dtype(target).value)

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The result of ``make``, computed once for every key."""
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]

    # -- results -------------------------------------------------------------------------------------------------------

    def set(self, node: fx.Node, value: ir.Value, shape: Sizes | None = None) -> None:
        """Set the result of a node, in its own shape or another one of the same elements."""
        self._elements[node] = Elements.of(self.graph, self.sizes, self.shape(node) if shape is None else shape, value)

    def set_rows(self, node: fx.Node, value: ir.Value) -> None:
        """Set the result of a node, given as ``[rows, last]``."""
        self.set(node, value, rows_of(self.shape(node)))

    def set_elements(self, node: fx.Node, elements: Elements) -> None:
        """Let a node share or own elements."""
        self._elements[node] = elements

    def set_tuple(self, node: fx.Node, values: Sequence[tuple[Sizes, ir.Value]]) -> None:
        """Set the results of a node that gives several tensors, each with the shape it is computed in."""
        self._tuples[node] = [Elements.of(self.graph, self.sizes, shape, value) for shape, value in values]

    def deferred(self, make: Callable[[], tuple[Sizes, ir.Value]], swapped: Elements | None = None) -> Elements:
        """Elements computed when they are first read."""
        scope = self.graph.scope

        def make_in_scope() -> tuple[Sizes, ir.Value]:
            outer, self.graph.scope = self.graph.scope, scope
            try:
                return make()
            finally:
                self.graph.scope = outer

        return Elements(self.graph, self.sizes, make=make_in_scope, swapped=swapped)


def _needed(program: Program) -> set[fx.Node]:
    """The nodes that an output depends on."""
    waiting = list(program.output.all_input_nodes)
    needed: set[fx.Node] = set()
    while waiting:
        node = waiting.pop()
        if node not in needed:
            needed.add(node)
            waiting.extend(node.all_input_nodes)
    return needed


def _results(program: Program) -> tuple[Any, ...]:
    results: Any = program.output.args[0]
    return tuple(results)
