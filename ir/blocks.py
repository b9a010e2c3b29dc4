"""The blocks of a model: its repeated layers, as stretches of the graph."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from graphwright.ir.program import Program
from graphwright.ir.provenance import path_of
from graphwright.ir.stacks import find_stacks

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

    A layer is a module whose path ends with the first number in it (``encoder.layer.3``); where no path has a number,
    layers are found by structure, see :func:`graphwright.ir.stacks.find_stacks`. Nodes that belong to no layer stay
    with the one before them, except after the last: what follows it is a block by itself, as is what comes before the
    first.
    """
    calls = [node for node in program.nodes if node.op == "call_function"]
    paths = [_layer(node) for node in calls]
    if not any(paths):
        found = _by_structure(program)
        paths = [found.get(node, "") for node in calls]
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


def _by_structure(program: Program) -> dict[fx.Node, str]:
    """The layer of each node that belongs to one: its common module path, or its number where that says nothing."""
    layers = [layer for stack in find_stacks(program) for layer in stack.layers]
    paths = [layer.path for layer in layers]
    return {
        node: path if path and paths.count(path) == 1 else f"layer {number}"
        for number, (layer, path) in enumerate(zip(layers, paths, strict=True))
        for node in (*layer.nodes, *layer.aside)
    }


def _layer(node: fx.Node) -> str:
    found = _NUMBERED.match(path_of(node))
    return found.group() if found is not None else ""
