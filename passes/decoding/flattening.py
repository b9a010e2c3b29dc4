"""Letting operators on rows see batch and tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from graphwright.ir.names import op_name
from graphwright.ir.pattern import Refusal
from graphwright.ir.program import Program
from graphwright.ir.provenance import path_of
from graphwright.ir.types import TensorType
from graphwright.passes.base import Pass
from graphwright.passes.decoding.row_wise import again, is_rows, operands_by_row

_RESHAPES = frozenset({"aten.reshape", "aten.view"})


@dataclass(frozen=True, kw_only=True)
class UnflattenRows(Pass):
    """Take away the reshapes between which rows are not told apart by batch and token.

    Before (OPT)::

        %flat = aten.reshape(%x, [-1, 32])
        %normed = aten.layer_norm(%flat, [32], %weight, %bias)
        %y = aten.linear(%normed, %up)
        %z = aten.reshape(%y, [%batch, %tokens, 64])

    After::

        %normed = aten.layer_norm(%x, [32], %weight, %bias)
        %z = aten.linear(%normed, %up)

    What selects rows, and what fuses residuals, then sees one shape throughout.

    Does not fire when

    - an operator between the reshapes mixes rows, or is none of the known ones on each row by itself;
    - a flattened value is used elsewhere too, or does not come from ``[batch, tokens, features]``.
    """

    name: ClassVar[str] = "unflatten-rows"
    after: ClassVar[tuple[str, ...]] = ("transpose-linears",)
    respects: ClassVar[frozenset[str]] = frozenset()

    def run(self, program: Program) -> bool:
        """Find where rows are told apart again, and go back from there to where they ceased to be."""
        selected = self.selected(program)
        refusals: list[Refusal] = []
        exits = {node for node in program.nodes if _is_exit(program, node) and selected(node)}
        region: dict[fx.Node, list[fx.Node]] = {}
        reached = {_source(node) for node in exits}
        for node in reversed(program.nodes):
            if node not in reached or _is_entry(program, node):
                continue
            operands = operands_by_row(program, node, 1)
            if isinstance(operands, str):
                refusals.append(Refusal(self.name, node.name, path_of(node), operands, 1))
            else:
                region[node] = operands
                reached.update(operands)
        self._narrow(program, region, exits, refusals)
        with program.edit() as rewriter:
            made: dict[fx.Node, fx.Node] = {}
            for node in sorted(region):
                mapping = {each: made[each] if each in made else _source(each) for each in region[node]}
                made[node] = again(rewriter, node, mapping)
            for node in sorted(exits):
                rewriter.replace(node, made[_source(node)])
        program.notes["rewrites"] = program.notes.get("rewrites", 0) + len(exits)
        program.notes["refusals"] = (*program.notes.get("refusals", ()), *refusals)
        return bool(exits)

    def _narrow(
        self,
        program: Program,
        region: dict[fx.Node, list[fx.Node]],
        exits: set[fx.Node],
        refusals: list[Refusal],
    ) -> None:
        """Take out of region and exits what cannot be done, until all that is left can."""
        leads: dict[fx.Node, tuple[Any, ...]] = {}
        while True:
            wrong: dict[fx.Node, str] = {}
            for node in sorted(region):
                found = {leads.get(source) if source in region else _lead(program, source) for source in region[node]}
                (lead,) = found if len(found) == 1 else (None,)
                outside = next((user for user in node.users if user not in region and user not in exits), None)
                if lead is None:
                    wrong[node] = "it does not come from [batch, tokens, features]"
                elif outside is not None:
                    wrong[node] = f"%{outside.name} reads it without batch and tokens"
                else:
                    leads[node] = lead
            for node in wrong:
                del region[node]
            gone = {node for node in exits if _source(node) not in region}
            gone |= {node for node in exits - gone if leads[_source(node)] != _shape(program, node)[:2]}
            exits -= gone
            refusals += [Refusal(self.name, node.name, path_of(node), why, 2) for node, why in wrong.items()]
            if not wrong and not gone:
                return


def _source(reshape: fx.Node) -> fx.Node:
    source = reshape.args[0]
    assert isinstance(source, fx.Node)
    return source


def _shape(program: Program, node: fx.Node) -> tuple[Any, ...]:
    kind = program.type_of(node)
    return kind.shape if isinstance(kind, TensorType) else ()


def _is_exit(program: Program, node: fx.Node) -> bool:
    """Whether it makes ``[batch, tokens, features]`` of flat rows."""
    if op_name(node) not in _RESHAPES or not is_rows(program, node, 2):
        return False
    before = _shape(program, _source(node))
    return len(before) == 2 and before[1] == _shape(program, node)[2]


def _is_entry(program: Program, node: fx.Node) -> bool:
    return _lead(program, node) is not None


def _lead(program: Program, node: fx.Node) -> tuple[Any, ...] | None:
    """Batch and tokens of what a node flattens, or ``None`` if it does not."""
    if op_name(node) not in _RESHAPES or not is_rows(program, node, 1):
        return None
    before = _shape(program, _source(node))
    return before[:2] if len(before) == 3 and before[2] == _shape(program, node)[1] else None
