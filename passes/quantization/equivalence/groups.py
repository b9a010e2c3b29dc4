"""Linears that share an input, and so can share a factor for each of its features."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from graphwright.ir.arguments import arguments_of
from graphwright.ir.mapped import release
from graphwright.ir.names import op_name
from graphwright.ir.pattern import Refusal
from graphwright.ir.program import Program
from graphwright.ir.provenance import path_of, tags_of
from graphwright.passes.quantization.targets import LinearTarget, is_head, linear_target
from graphwright.passes.selection import Predicate

_UNCHANGED = frozenset(
    f"aten.{name}"
    for name in ("contiguous", "clone", "alias", "detach", "to.dtype", "to.dtype_layout", "to.device", "_to_copy")
)


@dataclass(frozen=True)
class Group:
    """Linears that read one value, in order.

    Attributes:
        x: the value, ``[..., features]``.
        linears: at least one; every weight is read by one linear only.
    """

    x: fx.Node
    linears: tuple[LinearTarget, ...]

    @property
    def first(self) -> fx.Node:
        """The linear that comes first."""
        return self.linears[0].node

    def matrices(self, program: Program) -> list[torch.Tensor]:
        """The weights as ``[out, features]`` float32."""
        found = []
        for linear in self.linears:
            stored = program.tensor(linear.weight).detach()
            found.append((stored.t() if linear.transposed else stored).to(torch.float32))
            release(program.tensor(linear.weight))
        return found

    def refusal(self, name: str, reason: str, depth: int = 1) -> Refusal:
        """That a pass leaves the group alone."""
        return Refusal(name, self.first.name, path_of(self.first), reason, depth)


def readers_of(program: Program, weight: fx.Node) -> list[fx.Node]:
    """All nodes that read a weight, whichever ``get_attr`` node they do it through."""
    same = [node for node in program.nodes if node.op == "get_attr" and node.target == weight.target]
    return [user for node in same for user in node.users]


def groups_of(
    program: Program, chosen: Predicate, respects: frozenset[str], *, lm_head: bool = False
) -> Iterator[Group | tuple[fx.Node, str]]:
    """The groups in the order of their first linears, and linears that belong to none, with the reason."""
    found: dict[fx.Node, list[LinearTarget]] = {}
    refused: list[tuple[fx.Node, str]] = []
    for node in program.nodes:
        target = linear_target(program, node) if node.op == "call_function" else None
        if target is None:
            continue
        reason = target if isinstance(target, str) else _objection(program, target, chosen, respects, lm_head)
        if reason is not None:
            refused.append((node, reason))
        elif isinstance(target, LinearTarget):
            found.setdefault(target.x, []).append(target)
    yield from (Group(x, tuple(linears)) for x, linears in found.items())
    yield from refused


def _objection(
    program: Program, target: LinearTarget, chosen: Predicate, respects: frozenset[str], lm_head: bool
) -> str | None:
    if not chosen(target.node):
        return "not selected by where= / ignore="
    protected = tags_of(target.node) & respects
    if protected:
        return f"it is tagged {', '.join(sorted(protected))}, which this pass leaves alone"
    if not lm_head and is_head(program, target.node):
        return "it is the output head, which is left as it is (set lm_head=True to scale its input)"
    others = [user for user in readers_of(program, target.weight) if user is not target.node]
    if others:
        return f"its weight is also read by %{others[0].name}, whose input may need other factors"
    return None


def is_assertion(node: fx.Node) -> bool:
    """Whether a node only checks dtype and device of a value."""
    return op_name(node) == "aten._assert_tensor_metadata"


def gives_its_input(node: fx.Node) -> bool:
    """Whether an operator's value is its input's: copies, changes of dtype, dropout that is off."""
    name = op_name(node)
    return name in _UNCHANGED or (name == "aten.dropout" and not arguments_of(node)["train"])
