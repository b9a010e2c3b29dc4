"""Computing equal expressions once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from graphwright.ir.arguments import arguments_of
from graphwright.ir.names import op_name
from graphwright.ir.pattern import Refusal
from graphwright.ir.program import Program
from graphwright.ir.provenance import path_of, tags_of
from graphwright.ir.types import ScalarType
from graphwright.passes.base import Pass
from graphwright.passes.cleanup.effects import is_pure, is_random
from graphwright.passes.contract import Exact

# Operators whose first two operands may be swapped without changing a bit of the result.
_COMMUTATIVE = frozenset(
    f"aten.{name}"
    for name in (
        "add.Tensor",
        "mul.Tensor",
        "maximum",
        "minimum",
        "eq.Tensor",
        "ne.Tensor",
        "logical_and",
        "logical_or",
        "logical_xor",
        "bitwise_and.Tensor",
        "bitwise_or.Tensor",
        "bitwise_xor.Tensor",
        "__and__.Tensor",
        "__or__.Tensor",
        "__xor__.Tensor",
    )
)


@dataclass(frozen=True, kw_only=True)
class EliminateCommonSubexpressions(Pass):
    """Let equal expressions share one node, the first of them.

    Before::

        %cos = aten.unsqueeze(%table, 1)
        %a = aten.mul.Tensor(%query, %cos)
        %cos_1 = aten.unsqueeze(%table, 1)
        %b = aten.mul.Tensor(%key, %cos_1)

    After::

        %cos = aten.unsqueeze(%table, 1)
        %a = aten.mul.Tensor(%query, %cos)
        %b = aten.mul.Tensor(%key, %cos)

    Expressions are equal when they call the same operator on the same values with the same constants; the operands of
    commutative operators may stand in either order. Sizes that are the same expression over the program's dimensions
    are equal, wherever they are read from.

    Does not fire when

    - the operator draws random numbers, such as a dropout that is on, or leaves memory uninitialised;
    - the constants differ in type only (``1`` and ``1.0``);
    - the nodes carry different tags, such as ``adapter``;
    - the operator has an effect besides its value.
    """

    name: ClassVar[str] = "eliminate-common-subexpressions"
    contract: ClassVar[Exact] = Exact(bitwise=True)

    def run(self, program: Program) -> bool:
        """One sweep in execution order finds every equal expression, since operands are merged before their users."""
        selected = self.selected(program)
        first: dict[Any, fx.Node] = {}
        refusals: list[Refusal] = []
        merged = 0
        with program.edit() as rewriter:
            for node in program.nodes:
                if node._erased or node.op not in ("get_attr", "call_function"):
                    continue
                if tags_of(node) & self.respects or not selected(node):
                    continue
                key = (_expression(program, node), tags_of(node))
                known = first.setdefault(key, node)
                if known is node:
                    continue
                if is_random(node):
                    reason = f"{op_name(node)} gives another value each time, so it is not equal to %{known.name}"
                    refusals.append(Refusal(self.name, node.name, path_of(node), reason, 2))
                elif node.op == "get_attr" or is_pure(node):
                    rewriter.replace(node, known)
                    merged += 1
        program.notes["rewrites"] = program.notes.get("rewrites", 0) + merged
        program.notes["refusals"] = (*program.notes.get("refusals", ()), *refusals)
        return merged > 0


def _expression(program: Program, node: fx.Node) -> Any:
    """A key that equal expressions share."""
    if node.op == "get_attr":
        return "weight", program.aliases.get(str(node.target), str(node.target))
    kind = program.type_of(node)
    if isinstance(kind, ScalarType) and kind.kind == "int" and is_pure(node):
        return "size", kind.expression
    arguments = arguments_of(node)
    names = list(arguments)
    keys = {name: _constant(value) for name, value in arguments.items()}
    if op_name(node) in _COMMUTATIVE and arguments.get("alpha", 1) == 1:
        pair = sorted((keys[names[0]], keys[names[1]]), key=repr)
        keys[names[0]], keys[names[1]] = pair
    return op_name(node), tuple(keys.items())


def _constant(value: Any) -> Any:
    """A hashable key of an argument that tells 1 from 1.0 and True, and 0.0 from -0.0."""
    if isinstance(value, fx.Node):
        return "node", value.name
    if isinstance(value, list | tuple):
        return ("list", *(_constant(item) for item in value))
    if isinstance(value, Mapping):
        return ("dict", *((key, _constant(item)) for key, item in sorted(value.items())))
    if isinstance(value, slice):
        return ("slice", _constant(value.start), _constant(value.stop), _constant(value.step))
    if isinstance(value, torch.dtype | torch.device | torch.layout | torch.memory_format):
        return type(value).__name__, str(value)
    return type(value).__name__, repr(value)
