"""Copies of graphs."""

from __future__ import annotations

from torch import fx


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A copy of a graph with the same node names and its own metadata."""
    copied = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        new = copied.create_node(
            node.op,
            node.target,
            fx.node.map_arg(node.args, mapping.__getitem__),
            fx.node.map_arg(node.kwargs, mapping.__getitem__),
            node.name,
        )
        if new.name != node.name:
            # fx reserves python keywords and builtins only for generated names; keep ours as they are.
            new.name = node.name
        new.meta = dict(node.meta)
        mapping[node] = new
    return copied
