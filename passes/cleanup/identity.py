"""What the parts of :class:`RemoveNoOps` agree on."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from graphwright.ir.program import Program

# Looks at a node and gives the existing value it equals, the reason why it looks like a no-op but is none, or None.
Finding = Callable[[Program, fx.Node], fx.Node | str | None]


def is_applicable(program: Program, node: fx.Node, source: fx.Node) -> bool:
    """Whether a value may stand for another: same dtype, same shape at all sizes of the dimensions."""
    kind = program.type_of(node)
    return kind is not None and kind == program.type_of(source)
