"""Arguments of graph nodes by schema name, and the one spelling every node is kept in.

Canonical spelling: what the schema takes by position stands by position; trailing arguments and keyword-only arguments
that equal their default are left out. Patterns, equality and the text form rely on it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx


def schema_of(node: fx.Node) -> torch._C.FunctionSchema | None:
    """The operator schema of a node; ``None`` for ``getitem``, python arithmetic on sizes and non-calls."""
    target = node.target
    return target._schema if isinstance(target, torch._ops.OpOverload) else None


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """Every argument of the node by its schema name, defaults filled in.

    Nodes without a schema give ``{"0": first, "1": second, ...}``.
    """
    schema = schema_of(node)
    if schema is None:
        return {**{str(index): value for index, value in enumerate(node.args)}, **node.kwargs}
    found: dict[str, Any] = {}
    for index, argument in enumerate(schema.arguments):
        if not argument.kwarg_only and index < len(node.args):
            found[argument.name] = node.args[index]
        elif argument.name in node.kwargs:
            found[argument.name] = node.kwargs[argument.name]
        elif argument.has_default_value():
            found[argument.name] = argument.default_value
    return found


def argument(node: fx.Node, name: str) -> Any:
    """One argument of the node by schema name, or its default."""
    return arguments_of(node)[name]


def canonical_call(
    target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The canonical spelling of a call to ``target``."""
    if not isinstance(target, torch._ops.OpOverload):
        return args, kwargs
    positional: list[Any] = list(args)
    keywords = dict(kwargs)
    spelled = [item for item in target._schema.arguments if not item.kwarg_only]
    for item in spelled[len(positional) :]:
        if item.name in keywords:
            positional.append(keywords.pop(item.name))
        elif item.has_default_value() and any(later.name in keywords for later in spelled):
            positional.append(item.default_value)
        else:
            break
    while positional and len(positional) <= len(spelled):
        item = spelled[len(positional) - 1]
        if not item.has_default_value() or not _same_constant(positional[-1], item.default_value):
            break
        positional.pop()
    for item in target._schema.arguments:
        if item.kwarg_only and item.name in keywords and item.has_default_value():
            if _same_constant(keywords[item.name], item.default_value):
                del keywords[item.name]
    return tuple(positional), keywords


def _same_constant(value: Any, default: Any) -> bool:
    if isinstance(value, fx.Node) or isinstance(default, fx.Node):
        return False
    if isinstance(value, list | tuple) and isinstance(default, list | tuple):
        return len(value) == len(default) and all(_same_constant(a, b) for a, b in zip(value, default, strict=True))
    return type(value) is type(default) and bool(value == default)


def canonicalize(node: fx.Node) -> None:
    """Bring one node into the canonical spelling, in place."""
    if node.op != "call_function":
        return
    args, kwargs = canonical_call(node.target, node.args, node.kwargs)
    if args != node.args or kwargs != node.kwargs:
        node.args, node.kwargs = args, kwargs
