"""What a program costs: parameters, bytes and multiply-accumulates, per node, per module and in total."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphwright.ir import ops
from graphwright.ir.arguments import arguments_of
from graphwright.ir.errors import InputError
from graphwright.ir.macs import Shape, rule_of
from graphwright.ir.names import op_name
from graphwright.ir.ops.definition import Cost
from graphwright.ir.program import Program
from graphwright.ir.provenance import path_of
from graphwright.ir.types import VAL, SymbolTable

# Operators that only look at their operand in another way: they read and write nothing by themselves.
_VIEWS = frozenset(
    f"aten.{name}"
    for name in (
        *("view", "reshape", "expand", "unsqueeze", "squeeze", "squeeze.dim", "transpose.int", "permute", "t", "alias"),
        *("slice.Tensor", "select.int", "detach", "split.Tensor", "split_with_sizes", "chunk", "unbind.int"),
        *("flatten.using_ints", "unflatten.int", "view_as", "expand_as", "narrow", "movedim.int", "swapaxes"),
    )
) | {"py.getitem"}
# Operators that need nothing of their operand but its shape.
_SHAPE_ONLY = ("aten.new_", "aten.zeros_like", "aten.ones_like", "aten.empty_like", "aten.full_like")
_LOOKUPS = ("aten.embedding", "graphwright.embedding_nbits")


@dataclass(frozen=True)
class NodeCost:
    """Cost of one node.

    Attributes:
        node: its name.
        path: its module path.
        op: its operator.
        parameters: elements of the weights it reads.
        cost: bytes and multiply-accumulates. A look-up reads the rows it gives, not the whole table.
    """

    node: str
    path: str
    op: str
    parameters: int
    cost: Cost


@dataclass(frozen=True)
class ProgramCost:
    """Cost of a program at given sizes.

    Attributes:
        sizes: the dimension sizes it was computed for.
        nodes: every call, in order.
        parameters: elements of all weights, tied ones once.
        total: work of one run; ``weight_bytes`` are those of all weights, each once, however often it is read.
        unknown: nodes with sizes that depend on values (``nonzero``, ...); such a size counts as 1.
    """

    sizes: Mapping[str, int]
    nodes: tuple[NodeCost, ...]
    parameters: int
    total: Cost
    unknown: tuple[str, ...] = ()

    def by_module(self, depth: int = 2) -> dict[str, Cost]:
        """Costs summed by the first ``depth`` parts of the module path."""
        grouped: dict[str, Cost] = {}
        for item in self.nodes:
            key = ".".join(item.path.split(".")[:depth]) if item.path and depth > 0 else "(root)"
            grouped[key] = grouped.get(key, Cost()) + item.cost
        return grouped

    def table(self, depth: int = 2) -> str:
        """A text table by module. The total counts a weight once that several modules read."""
        rows = [("module", "MACs", "weight bytes", "activation bytes")]
        for key, cost in [*self.by_module(depth).items(), ("total", self.total)]:
            rows.append((key, f"{cost.macs:,}", f"{cost.weight_bytes:,}", f"{cost.activation_bytes:,}"))
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))])
            for row in rows
        ]
        return "\n".join(line.rstrip() for line in lines)


def cost_of(program: Program, sizes: Mapping[str, int] | None = None) -> ProgramCost:
    """Cost of a program.

    Args:
        program: typed program.
        sizes: size of every dimension that should not have the one it was traced with.

    Raises:
        InputError: a size for a dimension the program does not have, or one it does not admit.
    """
    counter = _Counter(program, _sizes(program, sizes or {}))
    nodes = tuple(counter.count(node) for node in program.nodes if node.op == "call_function")
    tensors = program.tensors().values()
    return ProgramCost(
        sizes=counter.sizes,
        nodes=nodes,
        parameters=sum(tensor.numel() for tensor in tensors),
        total=Cost(
            macs=sum(item.cost.macs for item in nodes),
            weight_bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors),
            activation_bytes=sum(item.cost.activation_bytes for item in nodes),
        ),
        unknown=tuple(counter.unknown),
    )


def _sizes(program: Program, given: Mapping[str, int]) -> dict[str, int]:
    for name, size in given.items():
        dim = program.dims.get(name)
        if dim is None:
            known = ", ".join(program.dims) or "none"
            raise InputError(f"the program has no dimension {name!r}", hint=f"it has {known}")
        if isinstance(size, bool) or not isinstance(size, int) or not dim.admits(size):
            limits = f"{dim.min}..{'' if dim.max is None else dim.max}"
            raise InputError(f"{size!r} is not a size the program takes ({limits})", where=f"dimension {name!r}")
    return {name: given.get(name, dim.hint) for name, dim in program.dims.items()}


class _Counter:
    def __init__(self, program: Program, sizes: dict[str, int]) -> None:
        self.sizes = sizes
        self.symbols: SymbolTable = program.symbols
        self.unknown: dict[str, None] = {}
        self._known: dict[Any, int | None] = {}
        self._node = ""

    def count(self, node: fx.Node) -> NodeCost:
        self._node = node.name
        name, value = op_name(node), node.meta.get(VAL)
        weights = {source for source in node.all_input_nodes if source.op == "get_attr"}
        parameters = sum(source.meta[VAL].numel() for source in weights)
        weight_bytes = activation_bytes = 0
        if _holds_tensor(value) and name not in _VIEWS and not _is_identity(node, name):
            activation_bytes = self._bytes(value)
            reads = [] if name.startswith(_SHAPE_ONLY) else node.all_input_nodes
            activation_bytes += sum(self._bytes(source.meta.get(VAL)) for source in reads if source not in weights)
            weight_bytes = sum(self._weight_bytes(node, name, source) for source in weights)
        return NodeCost(
            node.name, path_of(node), name, parameters, Cost(self._macs(node, name), weight_bytes, activation_bytes)
        )

    def _weight_bytes(self, node: fx.Node, name: str, weight: fx.Node) -> int:
        whole = self._bytes(weight.meta[VAL])
        if name not in _LOOKUPS:
            return whole
        indices = arguments_of(node)["indices"]
        if indices is weight:
            return whole
        rows = int(weight.meta[VAL].shape[0])
        return whole * min(math.prod(self._shape(indices.meta[VAL])), rows) // max(rows, 1)

    def _macs(self, node: fx.Node, name: str) -> int:
        definition = ops.definition_of(node.target)
        rule = rule_of(name)
        if definition is None and rule is None:
            return 0
        arguments = {key: self._as_shapes(value) for key, value in arguments_of(node).items()}
        if definition is not None:
            return definition.macs(arguments)
        assert rule is not None
        value = node.meta[VAL]
        return rule(arguments, self._shape(value) if isinstance(value, torch.Tensor) else ())

    def _as_shapes(self, item: Any) -> Any:
        if isinstance(item, list | tuple):
            return [self._as_shapes(element) for element in item]
        if not isinstance(item, fx.Node):
            return item
        value = item.meta.get(VAL)
        if isinstance(value, torch.Tensor):
            return self._shape(value)
        return self._size(value) if isinstance(value, torch.SymInt) else value

    def _bytes(self, value: Any) -> int:
        if isinstance(value, tuple | list):
            return sum(map(self._bytes, value))
        if not isinstance(value, torch.Tensor):
            return 0
        return math.prod(self._shape(value)) * value.element_size()

    def _shape(self, value: torch.Tensor) -> Shape:
        return tuple(map(self._size, value.shape))

    def _size(self, size: int | torch.SymInt) -> int:
        if isinstance(size, int):
            return size
        expression = size.node.expr
        if expression not in self._known:
            self._known[expression] = self.symbols.concrete(size, self.sizes)
        found = self._known[expression]
        if found is None:
            self.unknown[self._node] = None
            return 1
        return found


def _holds_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor) or (isinstance(value, tuple | list) and any(map(_holds_tensor, value)))


def _is_identity(node: fx.Node, name: str) -> bool:
    return name == "aten.dropout" and arguments_of(node)["train"] is False
