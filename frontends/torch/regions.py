"""Regions of a trace (``torch.no_grad``, ``torch.autocast``) put in line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

GRAD = "wrap_with_set_grad_enabled"  # (enabled, body, *operands)
AUTOCAST = "wrap_with_autocast"  # (device, dtype, enabled, cache, body, *operands)


def kind_of(node: fx.Node) -> str:
    """Which region a node is, or an empty string."""
    name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
    return name if name in (GRAD, AUTOCAST) else ""


def inline(module: fx.GraphModule, differentiable: Callable[[fx.Node], bool]) -> bool:
    """Put the bodies of regions in line; gives ``False`` if autocast regions are left.

    Where gradients would otherwise flow through a region that is without them, its result is detached. Autocast that is
    switched off does nothing; where it is on, the casts are not in the graph, and torch must write them out.

    Args:
        module: the traced module; changed in place.
        differentiable: whether gradients may reach a placeholder or weight.
    """
    done = True
    for node in list(module.graph.nodes):
        kind = kind_of(node)
        if not kind:
            continue
        first = 1 if kind == GRAD else 4
        if kind == AUTOCAST and node.args[2]:
            done = False
            continue
        body = getattr(module, str(node.args[first].target))
        operands = list(node.args[first + 1 :])
        reached = {
            inner: _reaches(outer, differentiable) for inner, outer in zip(_placeholders(body), operands, strict=True)
        }
        if not inline(body, reached.__getitem__):
            done = False
            continue
        _splice(
            module.graph, node, body, operands, detach=kind == GRAD and not node.args[0], differentiable=differentiable
        )
    return done


def _placeholders(body: fx.GraphModule) -> list[fx.Node]:
    return [node for node in body.graph.nodes if node.op == "placeholder"]


def _reaches(node: Any, differentiable: Callable[[fx.Node], bool]) -> bool:
    """Whether gradients flow into a value."""
    seen: set[fx.Node] = set()
    stack = [node] if isinstance(node, fx.Node) else []
    while stack:
        current = stack.pop()
        if current in seen or current.target is torch.ops.aten.detach.default:
            continue
        seen.add(current)
        value = current.meta.get("val")
        if isinstance(value, torch.Tensor) and not (value.is_floating_point() or value.is_complex()):
            continue
        if current.op in ("placeholder", "get_attr"):
            if differentiable(current):
                return True
        stack.extend(current.all_input_nodes)
    return False


def _splice(
    graph: fx.Graph,
    node: fx.Node,
    body: fx.GraphModule,
    operands: list[Any],
    *,
    detach: bool,
    differentiable: Callable[[fx.Node], bool],
) -> None:
    mapping: dict[fx.Node, Any] = dict(zip(_placeholders(body), operands, strict=True))
    results: Any = ()
    with graph.inserting_before(node):
        for inner in body.graph.nodes:
            if inner.op == "output":
                results = fx.node.map_arg(inner.args[0], mapping.__getitem__)
            elif inner.op != "placeholder":
                mapping[inner] = graph.node_copy(inner, mapping.__getitem__)
        for user in list(node.users):
            result = results[user.args[1]]
            if detach and _reaches(result, differentiable):
                inside = result
                result = graph.call_function(torch.ops.aten.detach.default, (inside,))
                result.meta = dict(inside.meta)
            user.replace_all_uses_with(result)
            graph.erase_node(user)
    graph.erase_node(node)
