"""The cut-point check: each value a pass replaced, recomputed from the old program's values and compared.

This is how hardware equivalence checkers work: where old and new graph share a value, the graph is cut, so that an
error shows at the very node that makes it, undiluted by the layers behind it, and unchanged regions cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from graphwright.ir.arguments import argument
from graphwright.ir.mapped import streaming
from graphwright.ir.names import op_name
from graphwright.ir.program import Program, Snapshot
from graphwright.ir.provenance import path_of
from graphwright.ir.taps import differ_by_taps
from graphwright.ir.types import VAL
from graphwright.passes.verification.comparison import Difference, compare
from graphwright.passes.verification.constants import native_constant
from graphwright.passes.verification.precise import run_node, wide
from graphwright.passes.verification.tables import compare_tables, is_lookup


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
        values: values of the new program for the next check, by node name; ``None`` when they must be computed anew,
            because a constant was stored as the program's own dtype rounds it: the old float64 values do not know that.
    """

    nodes: list[NodeDifference] = field(default_factory=list)
    values: dict[str, Any] | None = None

    def worst(self) -> NodeDifference | None:
        """The value that moved most."""
        return max(self.nodes, key=lambda item: item.difference.worst, default=None)

    def loosest(self) -> NodeDifference | None:
        """The value with the largest relative (root mean square) error."""
        return max(self.nodes, key=lambda item: item.difference.relative, default=None)


def check_locally(before: Snapshot, old_values: Mapping[str, Any], program: Program) -> LocalResult:
    """Compare a program with the one it was, value by value, on float64 values of the old one.

    A node of the new program is taken over unchanged when the old one had a node of that name with the same target,
    weights and operands. Every other node is computed; if it stands for an old value (its own name, or what the
    rewriter recorded) of its type, the two are compared, and the old value is what later nodes read.

    Args:
        before: the state before the pass.
        old_values: values of that state in float64, see :func:`precise.run`.
        program: the program after the pass.
    """
    check = _Check(before, old_values, program)
    with torch.no_grad(), streaming((*before.tensors.values(), *program.tensors().values())):
        for node in program.nodes:
            check.visit(node)
    return LocalResult(check.found, None if check.rounded else check.values())


class _Check:
    """One walk over the new program."""

    def __init__(self, before: Snapshot, old_values: Mapping[str, Any], program: Program) -> None:
        self.before = before
        self.old_values = old_values
        self.program = program
        self.old_nodes = {node.name: node for node in before.graph.nodes}
        self.claims = _claims(program.replacements, old_values)
        self.found: list[NodeDifference] = []
        self.identity: dict[fx.Node, str] = {}  # new node -> the old value it is, by construction or by comparison
        self.same_as: dict[str, str] = {}  # old value -> another old value equal to it bit for bit
        self.computed: dict[fx.Node, Any] = {}
        self.rounded = False

    def visit(self, node: fx.Node) -> None:
        """Take a node over, or compute and compare it."""
        old = self.old_nodes.get(node.name)
        if node.op == "placeholder":
            self.identity[node] = node.name
            self._compare(node, self.old_values[node.name], self.claims.get(node.name, []))
        elif node.op == "get_attr":
            kept = old is not None and _same(self.before.tensors.get(str(old.target)), self.program.tensor(node))
            claims = self.claims.get(node.name, [])
            if kept:
                self.identity[node] = node.name
            elif claims:  # a constant that was computed before
                value = wide(self.program.tensor(node))
                if not self._is_native_value(node, claims):
                    self._compare(node, value, claims)
                elif compare(value, self.old_values[claims[0]]).worst > 0.0:
                    self.rounded = True
                self.identity[node] = claims[0]
        elif node.op == "output":
            self._compare_outputs(node)
        elif node.users:
            self._visit_call(node, old)

    def _visit_call(self, node: fx.Node, old: fx.Node | None) -> None:
        own = [node.name] if node.name in self.old_values and self._is_of_the_same_type(node, node.name) else []
        claims = [*own, *(name for name in self.claims.get(node.name, []) if self._is_of_the_same_type(node, name))]
        if old is not None and own and self._same_call(node, old):
            self.identity[node] = node.name
            self._compare(node, self.old_values[node.name], claims[1:])
            return
        if claims and self._is_native_table(node, claims):
            self.identity[node] = claims[0]
            self.rounded = True
            return
        value = run_node(self.program, node, self.value_of)
        if not claims:
            self.computed[node] = value
            return
        self._compare(node, value, claims)
        for claim in claims:
            self._compare_table(node, claim)
        # Cut: what follows reads the old value, so that an error is charged to the node that makes it and to no other.
        self.identity[node] = claims[0]

    def _is_of_the_same_type(self, node: fx.Node, name: str) -> bool:
        """Whether a node is typed like an old one; where not, types were computed anew and it is another value."""
        old = self.old_nodes[name].meta.get(VAL)
        if old is node.meta.get(VAL):
            return True
        symbols = self.before.symbols or self.program.symbols
        return symbols.type_of_value(old) == self.program.type_of(node)

    def _is_native_value(self, node: fx.Node, claims: list[str]) -> bool:
        """Whether a new weight is, bit for bit, what the old program computed for every value it stands for."""
        stored = self.program.tensor(node)
        natives = [native_constant(self.before, self.old_nodes[claim]) for claim in claims]
        return all(
            native is not None and native.dtype == stored.dtype and compare(stored, native).worst == 0.0
            for native in natives
        )

    def _is_native_table(self, node: fx.Node, claims: list[str]) -> bool:
        """Whether a lookup finds in every row, bit for bit, what the old program computed from that index."""
        table = argument(node, "weight") if op_name(node) == "aten.embedding" else None
        if table is None or table.op != "get_attr":
            return False
        index, stored = self.identity.get(argument(node, "indices")), self.program.tensor(table)
        if index is None or self.before.tensors.get(str(table.target)) is stored:
            return False
        rows = torch.arange(stored.shape[0]).unsqueeze(0)
        for claim in claims:
            old = self.old_nodes[claim]
            if is_lookup(old) and self._canonical(argument(old, "indices").name) == self._canonical(index):
                return False  # rows against rows, see below
            native = native_constant(self.before, old, {index: rows})
            if native is None or native.dtype != stored.dtype or native.shape != (1, *stored.shape):
                return False
            if compare(native[0], stored).worst != 0.0:
                return False
        return True

    def _compare_table(self, node: fx.Node, claim: str) -> None:
        """Compare all rows of a lookup that stands for a lookup with the same indices."""
        old = self.old_nodes[claim]
        if not is_lookup(node) or not is_lookup(old):
            return
        indices, wanted = argument(node, "indices"), argument(old, "indices")
        if self._canonical(self.identity.get(indices, "?")) != self._canonical(wanted.name):
            return
        difference = compare_tables(self.program, node, old, self.value_of, self._old_value)
        self.found.append(NodeDifference(node.name, path_of(node), claim, difference))

    def _compare(self, node: fx.Node, value: Any, claims: list[str]) -> None:
        """Compare a value with every old one it stands for, and note which of those are interchangeable."""
        first = self.identity.get(node, claims[0] if claims else "")
        for claim in claims:
            difference = compare(value, self.old_values[claim])
            self.found.append(NodeDifference(node.name, path_of(node), claim, difference))
            if claim != first and compare(self.old_values[first], self.old_values[claim]).worst == 0.0:
                self.same_as[claim] = first

    def value_of(self, node: fx.Node) -> Any:
        """The value later nodes read."""
        name = self.identity.get(node)
        if node.op == "get_attr" and name not in self.old_values:
            return self.program.tensor(node)
        return self.old_values[name] if name is not None else self.computed[node]

    def values(self) -> dict[str, Any]:
        """Values of all nodes of the new program, by name."""
        known = [node for node in self.program.nodes if node.op in ("placeholder", "call_function")]
        return {node.name: self.value_of(node) for node in known if node in self.identity or node in self.computed}

    def _same_call(self, node: fx.Node, old: fx.Node) -> bool:
        if node.target != old.target:
            return False
        mine = _spelled((node.args, node.kwargs), lambda operand: self._canonical(self.identity.get(operand, "?")))
        return mine == _spelled((old.args, old.kwargs), lambda operand: self._canonical(operand.name))

    def _canonical(self, name: str) -> str:
        while name in self.same_as:
            name = self.same_as[name]
        return name

    def _compare_outputs(self, output: fx.Node) -> None:
        old_output = self.before.graph.output_node()
        old_items, new_items = old_output.args[0], output.args[0]
        assert isinstance(old_items, tuple | list)
        assert isinstance(new_items, tuple | list)
        if len(old_items) != len(new_items) and not self._has_other_taps():
            self.found.append(NodeDifference(output.name, "", old_output.name, compare((), (0,))))
            return
        for index, (old, new) in enumerate(zip(old_items, new_items, strict=False)):
            if isinstance(old, fx.Node) and isinstance(new, fx.Node) and self.identity.get(new) == old.name:
                continue
            value = wide(self.value_of(new)) if isinstance(new, fx.Node) else new
            difference = compare(value, self._old_output(old))
            self.found.append(NodeDifference(output.name, f"output {index}", old_output.name, difference))

    def _has_other_taps(self) -> bool:
        before = self.before.signature.output_names() if self.before.signature is not None else []
        return differ_by_taps(before, self.program.signature.output_names())

    def _old_output(self, item: Any) -> Any:
        return wide(self._old_value(item)) if isinstance(item, fx.Node) else item

    def _old_value(self, node: fx.Node) -> Any:
        return self.before.tensors[str(node.target)] if node.op == "get_attr" else self.old_values[node.name]


def _same(old: torch.Tensor | None, new: torch.Tensor) -> bool:
    """Whether two weights are one, or one memory seen alike: what is frozen gets a parameter of its own."""
    if old is new:
        return True
    if old is None or old.is_meta or new.is_meta:
        return False
    layout = (old.dtype, old.shape, old.stride(), old.data_ptr()) == (
        new.dtype,
        new.shape,
        new.stride(),
        new.data_ptr(),
    )
    return layout and old.device == new.device and old.numel() > 0


def _claims(replacements: Mapping[str, str], old_values: Mapping[str, Any]) -> dict[str, list[str]]:
    """For every new node name, the old values it was said to stand for; replacements of replacements are followed."""
    claims: dict[str, list[str]] = {}
    for old in replacements:
        if old not in old_values:
            continue
        name = old
        for _ in range(len(replacements)):
            if name not in replacements:
                break
            name = replacements[name]
        claims.setdefault(name, []).append(old)
    return claims


def _spelled(item: Any, name_of: Callable[[fx.Node], str]) -> str:
    """Operands as text, each node by the old value it stands for, so that two calls can be compared."""
    if isinstance(item, fx.Node):
        return f"%{name_of(item)}"
    if isinstance(item, Mapping):
        return f"{{{', '.join(f'{key}: {_spelled(value, name_of)}' for key, value in item.items())}}}"
    if isinstance(item, list | tuple):
        return f"[{', '.join(_spelled(value, name_of) for value in item)}]"
    return repr(item)
