"""Where a node comes from (its module path) and what earlier passes said about it (its tags)."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

PATH = "path"
TAGS = "tags"
SOURCE = "source"


def path_of(node: fx.Node) -> str:
    """Module path of the node, such as ``model.layers.3.mlp.down_proj``; empty for the root module and for inputs."""
    path: str = node.meta.get(PATH, "")
    return path


def source_of(node: fx.Node) -> str:
    """``file.py:line`` of the user's code that made the node, or an empty string."""
    source: str = node.meta.get(SOURCE, "")
    return source


def tags_of(node: fx.Node) -> frozenset[str]:
    """The tags of the node, such as ``quantized`` or ``adapter``."""
    tags: frozenset[str] = node.meta.get(TAGS, frozenset())
    return tags


def add_tags(node: fx.Node, tags: Iterable[str]) -> None:
    """Add tags to the node."""
    node.meta[TAGS] = tags_of(node) | frozenset(tags)


def describe(node: fx.Node) -> str:
    """``%name at module.path`` for messages."""
    path = path_of(node)
    return f"%{node.name} in {path}" if path else f"%{node.name}"
