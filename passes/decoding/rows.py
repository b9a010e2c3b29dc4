"""Computing only the rows of a step whose logits are wanted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from graphwright.ir.arguments import argument
from graphwright.ir.names import op_name
from graphwright.ir.pattern import Refusal
from graphwright.ir.program import Program
from graphwright.ir.provenance import path_of
from graphwright.ir.rewriter import Rewriter
from graphwright.passes.base import Pass
from graphwright.passes.decoding.row_wise import again, operands_by_row

_SELECT = "graphwright.select_rows"


@dataclass(frozen=True, kw_only=True)
class HoistRowSelection(Pass):
    """Select the wanted rows of a step as early as possible, so that what follows is computed for them only.

    Before::

        %sum = aten.add.Tensor(%x, %y)
        %normed = graphwright.rms_norm(%sum, %weight, 1e-05)
        %rows = graphwright.select_rows(%normed, %wanted)
        %logits = aten.linear(%rows, %head)

    After::

        %x_rows = graphwright.select_rows(%x, %wanted)
        %y_rows = graphwright.select_rows(%y, %wanted)
        %sum = aten.add.Tensor(%x_rows, %y_rows)
        %normed = graphwright.rms_norm(%sum, %weight, 1e-05)
        %logits = aten.linear(%normed, %head)

    In a decoder it moves over the final norm, the last layer's feed-forward block and residuals up to what the last
    attention gives and takes. A prefill that wants one row's logits then computes all of that for one row.

    Does not fire when

    - the operator mixes rows, or is none of the known ones on each row by itself;
    - the value is also read for other rows: it is computed for all of them anyway;
    - the value is not ``[batch, tokens, features]``, or an operand is broadcast along the rows.
    """

    name: ClassVar[str] = "hoist-row-selection"
    respects: ClassVar[frozenset[str]] = frozenset()

    def run(self, program: Program) -> bool:
        """Move all selections of the same rows together: what one of them shares with another moves as well."""
        selected = self.selected(program)
        refusals: list[Refusal] = []
        moved = 0
        wanted = dict.fromkeys(argument(node, "rows") for node in program.nodes if op_name(node) == _SELECT)
        with program.edit() as rewriter:
            for rows in wanted:
                moved += self._hoist(rewriter, rows, selected, refusals)
        program.notes["rewrites"] = program.notes.get("rewrites", 0) + moved
        program.notes["refusals"] = (*program.notes.get("refusals", ()), *refusals)
        return moved > 0

    def _hoist(
        self, rewriter: Rewriter, rows: fx.Node, selected: Callable[[fx.Node], bool], refusals: list[Refusal]
    ) -> int:
        program = rewriter.program
        selections = [node for node in rows.users if op_name(node) == _SELECT and argument(node, "rows") is rows]
        region: dict[fx.Node, list[fx.Node]] = {}  # node -> its operands that bring rows
        ends = set(selections)
        reached = {argument(node, "x") for node in selections}
        for node in reversed(program.nodes):
            if node not in reached:
                continue
            operands = operands_by_row(program, node, 2)
            outside = [user for user in node.users if user not in ends and user not in region]
            if isinstance(operands, str):
                refusals.append(Refusal(self.name, node.name, path_of(node), operands, len(region)))
            elif outside:
                reason = f"%{outside[0].name} reads its other rows too"
                refusals.append(Refusal(self.name, node.name, path_of(node), reason, len(region)))
            elif not selected(node):
                reason = "not selected by where= / ignore="
                refusals.append(Refusal(self.name, node.name, path_of(node), reason, len(region)))
            else:
                region[node] = operands
                reached.update(operands)
        if region:
            _rebuild(rewriter, rows, selections, region)
        return len(region)


def _rebuild(
    rewriter: Rewriter, rows: fx.Node, selections: Sequence[fx.Node], region: dict[fx.Node, list[fx.Node]]
) -> None:
    """Every node of the region on selected rows, and the selections replaced by what they selected from."""
    made: dict[fx.Node, fx.Node] = {}

    def on_rows(node: fx.Node) -> fx.Node:
        if node not in made:
            made[node] = rewriter.call(_SELECT, node, rows, like=node)
        return made[node]

    for node in sorted(region):
        made[node] = again(rewriter, node, {source: on_rows(source) for source in region[node]})
    for selection in selections:
        source = argument(selection, "x")
        if source in region:
            rewriter.replace(selection, made[source])
