"""The cut-point check: each value a pass replaced, recomputed from the old program's values and compared.

This is how hardware equivalence checkers work: where old and new graph share a value, the graph is cut, so that an
error shows
at the very node that makes it, undiluted by the layers behind it, and unchanged regions cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from graphwright.ir.program import Program, Snapshot
from graphwright.ir.provenance import path_of
from graphwright.passes.verification.comparison import Difference, compare
from graphwright.passes.verification.precise import run_node


@dataclass(frozen=True)
class NodeDifference:
    """Error of one replaced value."""

    node: str
    path: str
    stands_for: str
    difference: Difference


@dataclass
class LocalResult:
    """What the cut-point check found.

    Attributes:
        nodes: every value that could be compared.
        values: values of the new program for the next check, by node name.
    """

    nodes: list[NodeDifference] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)

    def worst(self) -> NodeDifference | None:
        """The value that moved most."""
        return max(self.nodes, key=lambda item: item.difference.worst, default=None)

    def loosest(self) -> NodeDifference | None:
        """The value with the largest relative (root mean square) error."""
        return max(self.nodes, key=lambda item: item.difference.relative, default=None)


def check_locally(before: Snapshot, old_values: Mapping[str, Any], program: Program) -> LocalResult:
    """Compare a program with the one it was, value by value, on float64 values of the old one.

    A node of the new program is taken over unchanged when the old one had a node of that name with the same target,
    weights
    and operands. Every other node is computed; if it stands for an old value (its own name, or what the rewriter
    recorded),
    the two are compared, and the old value is what later nodes read.

    Args:
        before: the state before the pass.
        old_values: values of that state in float64, see :func:`precise.run`.
        program: the program after the pass.
    """
    old_nodes = {node.name: node for node in before.graph.nodes}
    result = LocalResult()
    identity: dict[fx.Node, str] = {}  # new node -> the old value it is equal to by construction or by comparison
    computed: dict[fx.Node, Any] = {}

    def value_of(node: fx.Node) -> Any:
        if node.op == "get_attr":
            return program.tensor(node)
        name = identity.get(node)
        return old_values[name] if name is not None else computed[node]

    with torch.no_grad():
        for node in program.nodes:
            old = old_nodes.get(node.name)
            if node.op == "placeholder":
                identity[node] = node.name
            elif node.op == "get_attr":
                if (
                    old is not None
                    and old.op == "get_attr"
                    and before.tensors.get(str(old.target)) is program.tensor(node)
                ):
                    identity[node] = node.name
            elif node.op == "output":
                _compare_outputs(node, before, identity, computed, old_values, program, result)
            elif node.users:
                if old is not None and node.name in old_values and _same_call(node, old, identity):
                    identity[node] = node.name
                    continue
                value = run_node(program, node, value_of)
                claim = _claim(node, program.replacements, old_values)
                if claim is None:
                    computed[node] = value
                    continue
                difference = compare(value, old_values[claim])
                result.nodes.append(NodeDifference(node.name, path_of(node), claim, difference))
                identity[node] = claim
    for node in program.nodes:
        if node.op in ("placeholder", "call_function") and (node in identity or node in computed):
            result.values[node.name] = value_of(node)
    return result


def _same_call(node: fx.Node, old: fx.Node, identity: Mapping[fx.Node, str]) -> bool:
    if node.target != old.target:
        return False
    mine = _spelled((node.args, node.kwargs), lambda operand: str(identity.get(operand)))
    return mine == _spelled((old.args, old.kwargs), lambda operand: operand.name)


def _spelled(item: Any, name_of: Callable[[fx.Node], str]) -> str:
    """Operands as text, each node by the old value it stands for, so that two calls can be compared."""
    if isinstance(item, fx.Node):
        return f"%{name_of(item)}"
    if isinstance(item, Mapping):
        return f"{{{', '.join(f'{key}: {_spelled(value, name_of)}' for key, value in item.items())}}}"
    if isinstance(item, list | tuple):
        return f"[{', '.join(_spelled(value, name_of) for value in item)}]"
    return repr(item)


def _claim(node: fx.Node, replacements: Mapping[str, str], old_values: Mapping[str, Any]) -> str | None:
    name: str | None = (
        node.name if node.name in old_values and node.name not in replacements else replacements.get(node.name)
    )
    for _ in range(len(replacements) + 1):
        if name is None or name in old_values:
            return name
        name = replacements.get(name)
    return None


def _compare_outputs(
    output: fx.Node,
    before: Snapshot,
    identity: Mapping[fx.Node, str],
    computed: Mapping[fx.Node, Any],
    old_values: Mapping[str, Any],
    program: Program,
    result: LocalResult,
) -> None:
    old_output = before.graph.output_node()
    old_items, new_items = old_output.args[0], output.args[0]
    assert isinstance(old_items, tuple | list)
    assert isinstance(new_items, tuple | list)
    if len(old_items) != len(new_items):
        result.nodes.append(NodeDifference(output.name, "", old_output.name, compare((), (0,))))
        return
    for index, (old, new) in enumerate(zip(old_items, new_items, strict=True)):
        if isinstance(old, fx.Node) and isinstance(new, fx.Node) and identity.get(new) == old.name:
            continue
        old_value = _output_value(old, old_values, before.tensors)
        if isinstance(new, fx.Node) and new.op == "get_attr":
            new_value: Any = program.tensor(new).double()
        elif isinstance(new, fx.Node):
            new_value = old_values[identity[new]] if new in identity else computed[new]
        else:
            new_value = new
        result.nodes.append(
            NodeDifference(output.name, f"output {index}", old_output.name, compare(new_value, old_value))
        )


def _output_value(item: Any, old_values: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Any:
    if not isinstance(item, fx.Node):
        return item
    return tensors[str(item.target)].double() if item.op == "get_attr" else old_values[item.name]
