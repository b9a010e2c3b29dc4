"""Removing operators that give back what they were given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from graphwright.ir.names import op_name
from graphwright.ir.pattern import Match, Rule, apply_rules
from graphwright.ir.program import Program
from graphwright.ir.rewriter import Rewriter
from graphwright.ir.types import fake_of, is_tensor
from graphwright.passes.base import RulePass
from graphwright.passes.cleanup.arithmetic import arithmetic_identity
from graphwright.passes.cleanup.casts import CastChain, cast_identity, detach_identity, double_cast
from graphwright.passes.cleanup.effects import is_idle_dropout
from graphwright.passes.cleanup.identity import Finding, is_applicable
from graphwright.passes.cleanup.views import (
    PermutationChain,
    ReshapeChain,
    ViewAsReshape,
    permutation_identity,
    reshape_identity,
    slice_identity,
    squeeze_identity,
)

# Operators that fail, or read other elements, when the layout of their operand changes.
_LAYOUT_SENSITIVE = frozenset(
    {
        "aten.view",
        "aten.view.dtype",
        "aten._unsafe_view",
        "aten.as_strided",
        "aten.view_as_complex",
        "aten.sym_stride.int",
    }
)


@dataclass(frozen=True, kw_only=True)
class RemoveNoOps(RulePass):
    """Remove operators that give back what they were given, and merge chains that are one operator.

    Before::

        %dropped = aten.dropout(%x, 0.1, False)
        %same = aten.to.dtype(%dropped, torch.float32)
        %all = aten.slice.Tensor(%same, 1, 0, 9223372036854775807)
        %one = aten.mul.Tensor(%all, 1.0)
        %y = aten.relu(%one)

    After::

        %y = aten.relu(%x)

    What goes: dropout that is off; casts, slices, expands, reshapes and permutations that change nothing; ``+ 0`` on
    integers, ``- 0``, ``* 1``, ``/ 1``, ``** 1``, ``and True``, ``or False``; ``clone``, ``contiguous``, ``alias``;
    ``cat`` of one; permutations and ``unsqueeze``/``squeeze`` pairs that cancel; a cast through a dtype that holds
    every value exactly. Two reshapes, two permutations, or such casts in a row become one. ``view`` is written as
    ``reshape``, which means the same and does not depend on how the operand lies in memory.

    Does not fire when

    - the result's dtype or shape differs, also by broadcasting or promotion;
    - the sum is one of floats: ``x + 0.0`` turns -0.0 into 0.0;
    - a dropout is on;
    - a cast on the way cannot hold every value, so that it rounds;
    - ``squeeze`` names a dimension whose size varies: for size 1 it does something;
    - ``detach`` of a float: it stops the gradient when the program is trained;
    - the operator changes the layout in memory and one that depends on it, such as ``as_strided``, is in the program;
    - the program would return one of its own inputs or weights, into which a caller could write.
    """

    name: ClassVar[str] = "remove-no-ops"

    def rules(self, program: Program) -> Sequence[Rule]:
        """Spell views as reshapes first: what follows then may change layouts."""
        return [
            ViewAsReshape(),
            _Identity("dropout", _dropout_identity),
            _Identity("cast", cast_identity),
            _Identity("cast", double_cast),
            _Identity("detach", detach_identity),
            _Identity("copy", _copy_identity),
            _Identity("slice", slice_identity),
            _Identity("reshape", reshape_identity),
            _Identity("permutation", permutation_identity),
            _Identity("squeeze", squeeze_identity),
            _Identity("arithmetic", arithmetic_identity),
            CastChain(),
            ReshapeChain(),
            PermutationChain(),
        ]

    def run(self, program: Program) -> bool:
        """Repeat until nothing is left to remove; one removal can make the next possible."""
        selected = self.selected(program)
        earlier = tuple(program.notes.get("refusals", ()))
        total = 0
        views_first, *others = self.rules(program)
        while True:
            views = apply_rules(program, [views_first], selected, respects=self.respects)
            found = apply_rules(program, others, selected, respects=self.respects)
            total += views.rewrites + found.rewrites
            if not views.changed and not found.changed:
                break
        program.notes["rewrites"] = program.notes.get("rewrites", 0) + total
        program.notes["refusals"] = (*earlier, *views.refusals, *found.refusals)
        return total > 0


class _Identity(Rule):
    """An operator that gives back an existing value."""

    def __init__(self, name: str, find: Finding) -> None:
        self.name = f"remove-no-ops: {name}"
        self.find = find

    def match(self, program: Program, node: fx.Node) -> Match | tuple[int, str]:
        found = self.find(program, node)
        if found is None:
            return -1, ""
        if isinstance(found, str):
            return 2, found  # as deep as apply_rules asks for: what looked like a no-op is always worth a reason
        match = Match(program, node, {"source": found})
        match.inner = [node]
        return match

    def check(self, match: Match) -> str | None:
        program, root, source = match.program, match.root, match.node("source")
        if not is_applicable(program, root, source):
            return f"it changes {program.type_of(source)} to {program.type_of(root)}"
        returned = any(user.op == "output" for user in root.users)
        if returned and source.op in ("placeholder", "get_attr"):
            what = "input" if source.op == "placeholder" else "weight"
            return f"the program would return its own {what} %{source.name}, into which a caller could write"
        if not _same_layout(program, root, source):
            sensitive = next((node for node in program.nodes if op_name(node) in _LAYOUT_SENSITIVE), None)
            if sensitive is not None:
                return f"it changes the layout in memory, on which %{sensitive.name} = {op_name(sensitive)} may depend"
        return None

    def rewrite(self, rewriter: Rewriter, match: Match) -> fx.Node:
        return match.node("source")


def _same_layout(program: Program, first: fx.Node, second: fx.Node) -> bool:
    if not is_tensor(first) or not is_tensor(second):
        return True
    strides = [[program.symbols.render(step) for step in fake_of(node).stride()] for node in (first, second)]
    return strides[0] == strides[1]


def _dropout_identity(program: Program, node: fx.Node) -> fx.Node | str | None:
    name = op_name(node)
    if "dropout" not in name or not name.startswith("aten.") or name == "aten.native_dropout":
        return None
    if is_idle_dropout(node):
        source = node.args[0]
        return source if isinstance(source, fx.Node) else None
    return "the dropout is on: it drops values at random"


def _copy_identity(program: Program, node: fx.Node) -> fx.Node | str | None:
    if op_name(node) in ("aten.clone", "aten.contiguous", "aten.alias", "aten.lift_fresh_copy", "aten.lift_fresh"):
        source = node.args[0]
        return source if isinstance(source, fx.Node) else None
    if op_name(node) == "aten.cat":
        parts = node.args[0]
        if isinstance(parts, list | tuple) and len(parts) == 1 and isinstance(parts[0], fx.Node):
            return parts[0]
    return None
