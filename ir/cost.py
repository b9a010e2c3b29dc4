"""What a program costs: parameters, bytes and multiply-accumulates, per node, per module and in total."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphwright.ir import ops
from graphwright.ir.arguments import arguments_of
from graphwright.ir.conditions import evaluate
from graphwright.ir.errors import InputError
from graphwright.ir.names import op_name
from graphwright.ir.ops.definition import Cost
from graphwright.ir.program import Program
from graphwright.ir.provenance import path_of
from graphwright.ir.types import VAL

Shape = tuple[int, ...]

# Operators that only rename or move a view: they read and write nothing by themselves.
_VIEWS = frozenset(
    f"aten.{name}"
    for name in (
        *("view", "reshape", "expand", "unsqueeze", "squeeze", "squeeze.dim", "transpose.int", "permute", "t", "alias"),
        *("slice.Tensor", "select.int", "detach", "split.Tensor", "split_with_sizes", "chunk", "unbind.int"),
    )
) | {"py.getitem"}


@dataclass(frozen=True)
class NodeCost:
    """Cost of one node."""

    node: str
    path: str
    op: str
    cost: Cost


@dataclass(frozen=True)
class ProgramCost:
    """Cost of a program at given sizes.

    Attributes:
        sizes: the dimension sizes it was computed for.
        nodes: every call, in order.
        parameters: elements of all weights, tied ones once.
        total: work of one run; ``weight_bytes`` counts each weight once, however often it is read.
    """

    sizes: Mapping[str, int]
    nodes: tuple[NodeCost, ...]
    parameters: int
    total: Cost

    def by_module(self, depth: int = 2) -> dict[str, Cost]:
        """Costs summed by the first ``depth`` parts of the module path."""
        grouped: dict[str, Cost] = {}
        for item in self.nodes:
            key = ".".join(item.path.split(".")[:depth]) if item.path else "(root)"
            grouped[key] = grouped.get(key, Cost()) + item.cost
        return grouped

    def table(self, depth: int = 2) -> str:
        """A text table by module."""
        rows = [("module", "MACs", "weight bytes", "activation bytes")]
        for key, cost in self.by_module(depth).items():
            rows.append((key, f"{cost.macs:,}", f"{cost.weight_bytes:,}", f"{cost.activation_bytes:,}"))
        total = self.total
        rows.append(("total", f"{total.macs:,}", f"{total.weight_bytes:,}", f"{total.activation_bytes:,}"))
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        return "\n".join(
            "  ".join(
                cell.ljust(widths[column]) if column == 0 else cell.rjust(widths[column])
                for column, cell in enumerate(row)
            ).rstrip()
            for row in rows
        )


def cost_of(program: Program, sizes: Mapping[str, int] | None = None) -> ProgramCost:
    """Cost of a program.

    Args:
        program: typed program.
        sizes: size of every dimension that should not have the traced one.

    Raises:
        InputError: a size for a dimension the program does not have, or one it does not admit.
    """
    concrete = _sizes(program, sizes or {})
    nodes: list[NodeCost] = []
    total = Cost()
    for node in program.nodes:
        if node.op != "call_function":
            continue
        cost = _node_cost(program, node, concrete)
        nodes.append(NodeCost(node.name, path_of(node), op_name(node), cost))
        total = total + Cost(cost.macs, 0, cost.activation_bytes)
    tensors = program.tensors().values()
    weight_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    total = total + Cost(0, weight_bytes, 0)
    return ProgramCost(concrete, tuple(nodes), sum(tensor.numel() for tensor in tensors), total)


def _sizes(program: Program, given: Mapping[str, int]) -> dict[str, int]:
    for name, size in given.items():
        dim = program.dims.get(name)
        if dim is None:
            known = ", ".join(program.dims) or "none"
            raise InputError(f"the program has no dimension {name!r}", hint=f"it has {known}")
        if not dim.admits(size):
            raise InputError(f"{size} is not a size the program takes", where=f"dimension {name!r}")
    return {name: given.get(name, dim.hint) for name, dim in program.dims.items()}


def _node_cost(program: Program, node: fx.Node, sizes: Mapping[str, int]) -> Cost:
    name = op_name(node)
    weight_bytes = activation_bytes = 0
    if name not in _VIEWS:
        for source in node.all_input_nodes:
            size = _bytes(program, source.meta.get(VAL), sizes)
            if source.op != "get_attr":
                activation_bytes += size
            elif name in ("aten.embedding", "graphwright.embedding_nbits"):
                rows = source.meta[VAL].shape[0]
                weight_bytes += size * _rows_read(program, node, sizes) // max(1, rows)
            else:
                weight_bytes += size
        activation_bytes += _bytes(program, node.meta.get(VAL), sizes)
    return Cost(_macs(program, node, name, sizes), weight_bytes, activation_bytes)


def _rows_read(program: Program, node: fx.Node, sizes: Mapping[str, int]) -> int:
    shape = _shape(program, arguments_of(node)["indices"], sizes)
    return math.prod(shape)


def _bytes(program: Program, value: Any, sizes: Mapping[str, int]) -> int:
    if isinstance(value, tuple | list):
        return sum(_bytes(program, item, sizes) for item in value)
    if not isinstance(value, torch.Tensor):
        return 0
    return math.prod(_concrete(program, value, sizes)) * value.element_size()


def _concrete(program: Program, value: torch.Tensor, sizes: Mapping[str, int]) -> Shape:
    rendered = [program.symbols.render(size) for size in value.shape]
    return tuple(size if isinstance(size, int) else int(evaluate(size, sizes)) for size in rendered)


def _shape(program: Program, item: Any, sizes: Mapping[str, int]) -> Shape:
    return _concrete(program, item.meta[VAL], sizes)


def _macs(program: Program, node: fx.Node, name: str, sizes: Mapping[str, int]) -> int:
    arguments = arguments_of(node)
    shapes = {
        key: _shape(program, value, sizes)
        if isinstance(value, fx.Node) and isinstance(value.meta.get(VAL), torch.Tensor)
        else value
        for key, value in arguments.items()
    }
    definition = ops.definition_of(node.target)
    if definition is not None:
        return definition.macs(shapes)
    rule = _MACS.get(name)
    if rule is None:
        return 0
    value = node.meta[VAL]
    return rule(shapes, _concrete(program, value, sizes) if isinstance(value, torch.Tensor) else ())


def _linear(shapes: Mapping[str, Any], out: Shape) -> int:
    return math.prod(out) * int(shapes["weight"][-1])


def _matmul(left: str) -> Callable[[Mapping[str, Any], Shape], int]:
    def rule(shapes: Mapping[str, Any], out: Shape) -> int:
        return math.prod(out) * int(shapes[left][-1])

    return rule


def _convolution(shapes: Mapping[str, Any], out: Shape) -> int:
    # weight [out channels, in channels / groups, *kernel]
    return math.prod(out) * math.prod(int(size) for size in shapes["weight"][1:])


def _sdpa(shapes: Mapping[str, Any], out: Shape) -> int:
    batch, queries, width = math.prod(shapes["query"][:-2]), shapes["query"][-2], shapes["query"][-1]
    keys, value_width = shapes["value"][-2], shapes["value"][-1]
    return int(batch * queries * keys * (width + value_width))


_MACS: dict[str, Callable[[Mapping[str, Any], Shape], int]] = {
    "aten.linear": _linear,
    "aten.matmul": _matmul("self"),
    "aten.mm": _matmul("self"),
    "aten.bmm": _matmul("self"),
    "aten.addmm": _matmul("mat1"),
    "aten.baddbmm": _matmul("batch1"),
    "aten.conv1d": _convolution,
    "aten.conv2d": _convolution,
    "aten.conv3d": _convolution,
    "aten.convolution": _convolution,
    "aten.scaled_dot_product_attention": _sdpa,
}
