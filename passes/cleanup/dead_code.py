"""Removing what nothing depends on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from graphwright.ir.names import op_name
from graphwright.ir.pattern import Refusal
from graphwright.ir.program import Program
from graphwright.ir.provenance import path_of
from graphwright.passes.base import Pass
from graphwright.passes.cleanup.effects import is_assertion, is_pure, is_random
from graphwright.passes.contract import Exact


@dataclass(frozen=True, kw_only=True)
class RemoveDeadCode(Pass):
    """Remove nodes and weights that no output depends on, and the assertions that tracing leaves behind.

    Before::

        %_assert_tensor_metadata = aten._assert_tensor_metadata(%x, None, None, torch.float32)
        %unused = aten.exp(%x)
        %y = aten.relu(%x)

    After::

        %y = aten.relu(%x)

    Does not fire when

    - an unused operator draws random numbers: removing it would change those drawn after it;
    - an unused operator has an effect besides its value (it writes, or returns nothing);
    - the node is an input: the program's signature stays.
    """

    name: ClassVar[str] = "remove-dead-code"
    contract: ClassVar[Exact] = Exact(bitwise=True)
    respects: ClassVar[frozenset[str]] = frozenset()

    def run(self, program: Program) -> bool:
        """Remove from the back to the front, so that one pass is enough."""
        selected = self.selected(program)
        refusals: list[Refusal] = []
        removed = 0
        with program.edit() as rewriter:
            for node in reversed(program.nodes):
                if node._erased or node.users or node.op in ("placeholder", "output"):
                    continue
                reason = self._objection(node)
                if reason is None and selected(node):
                    rewriter.erase(node)
                    removed += 1
                elif reason is not None:
                    refusals.append(Refusal(self.name, node.name, path_of(node), reason))
        dropped = program.drop_unused_tensors()
        program.notes["rewrites"] = program.notes.get("rewrites", 0) + removed + len(dropped)
        program.notes["refusals"] = (*program.notes.get("refusals", ()), *refusals)
        return removed > 0 or bool(dropped)

    def _objection(self, node: fx.Node) -> str | None:
        if node.op in ("get_attr", "placeholder") or is_assertion(node):
            return None
        if is_random(node):
            return f"{op_name(node)} draws random numbers; without it those drawn after it would be others"
        if not is_pure(node):
            return f"{op_name(node)} may have an effect besides its value"
        # What only this node uses goes with it.
        alone = (source for source in node.all_input_nodes if len(source.users) == 1)
        return next(filter(None, map(self._objection, alone)), None)
