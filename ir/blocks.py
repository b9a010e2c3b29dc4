"""The blocks of a model: its repeated layers, as stretches of the graph."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from graphwright.ir.program import Program
from graphwright.ir.provenance import path_of

_NUMBERED = re.compile(r"(.*?\.)??\d+(?=\.|$)")


@dataclass(frozen=True)
class Block:
    """A stretch of a program.

    Attributes:
        path: module path of the layer, such as ``model.layers.3``; empty for what lies outside the layers.
        nodes: in order, those of the layer and what stands between them.
    """

    path: str
    nodes: tuple[fx.Node, ...]


def blocks_of(program: Program) -> list[Block]:
    """The program's calls, cut where one layer ends and the next begins.

    A layer is a module whose path ends with the first number in it (``encoder.layer.3``). Nodes that belong to no layer
    stay with the one before them, except after the last: what follows it is a block by itself, as is what comes before
    the first.
    """
    calls = [node for node in program.nodes if node.op == "call_function"]
    paths = [_layer(node) for node in calls]
    last = max((index for index, path in enumerate(paths) if path), default=-1)
    blocks: list[Block] = []
    start, current = 0, ""
    for index, path in enumerate(paths):
        if path == current or (not path and index < last):
            continue
        blocks += _block(current, calls[start:index])
        start, current = index, path
    return blocks + _block(current, calls[start:])


def _block(path: str, nodes: Sequence[fx.Node]) -> list[Block]:
    return [Block(path, tuple(nodes))] if nodes else []


def _layer(node: fx.Node) -> str:
    found = _NUMBERED.match(path_of(node))
    return found.group() if found is not None else ""
