"""Lookups are compared row by row: the tokens and positions of a probe see only a few rows of a table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

from graphwright.ir.arguments import argument
from graphwright.ir.names import op_name
from graphwright.ir.program import Program
from graphwright.passes.verification.comparison import Difference, compare, worst_of
from graphwright.passes.verification.precise import run_node

# operator -> the operand whose rows it looks up
_LOOKUPS: dict[str, str] = {"aten.embedding": "weight", "graphwright.embedding_nbits": "qweight"}

# A table is compared in slices of at most this many elements.
_SLICE_ELEMENTS = 1 << 22

ValueOf = Callable[[fx.Node], Any]


def is_lookup(node: fx.Node) -> bool:
    """Whether the node looks up rows of a table by index."""
    return op_name(node) in _LOOKUPS


def compare_tables(program: Program, new: fx.Node, old: fx.Node, new_value: ValueOf, old_value: ValueOf) -> Difference:
    """The largest difference of any row that both lookups have.

    Args:
        program: the program after the pass.
        new: a lookup of that program.
        old: the lookup it stands for.
        new_value: values of the operands of ``new``.
        old_value: values of the operands of ``old``.
    """
    # A pass may add rows, to pad a vocabulary, or take away rows that no index reaches.
    count = min(_rows(node, value_of) for node, value_of in ((new, new_value), (old, old_value)))
    width = max(1, int(new.meta["val"].shape[-1]))
    found = []
    for rows in _slices(count, max(1, _SLICE_ELEMENTS // width)):
        values = [_look_up(program, node, rows, value_of) for node, value_of in ((new, new_value), (old, old_value))]
        found.append(compare(*values))
    return worst_of(found)


def _rows(node: fx.Node, value_of: ValueOf) -> int:
    table = value_of(argument(node, _LOOKUPS[op_name(node)]))
    return int(table.shape[0])


def _slices(count: int, step: int) -> Iterator[torch.Tensor]:
    for start in range(0, count, step):
        yield torch.arange(start, min(start + step, count))


def _look_up(program: Program, node: fx.Node, rows: torch.Tensor, value_of: ValueOf) -> Any:
    indices = argument(node, "indices")
    return run_node(program, node, lambda operand: rows if operand is indices else value_of(operand))
