"""What no kernel takes, through torch.compile: stretches of a lowered graph between kernels become modules."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch.fx.passes.utils.fuser_utils import fuse_by_partitions

from graphwright.ir.errors import InputError


def compiler_of(choice: bool | str) -> str | None:
    """The backend of torch.compile that is meant, or ``None`` for no compiling.

    Raises:
        InputError: there is none of that name.
    """
    if isinstance(choice, bool):
        return "inductor" if choice else None
    known = torch.compiler.list_backends(exclude_tags=())
    if choice not in known:
        raise InputError(
            f"torch.compile has no backend {choice!r}",
            where="TritonBackend: compile_rest",
            hint=f"use True, or one of {', '.join(known)}",
        )
    return choice


def compile_rest(body: fx.GraphModule, compiler: str, *, dynamic: bool) -> tuple[fx.GraphModule, set[str]]:
    """Compile the stretches of a graph that lie between kernels.

    Args:
        body: kernels are modules in it; what lies between them are calls of functions.
        compiler: see :func:`compiler_of`.
        dynamic: sizes may differ between calls.

    Returns:
        the graph with one module for each stretch, and the names of the nodes that are in them.
    """
    stretches = list(_stretches(body.graph))
    compiled = {node.name for stretch in stretches for node in stretch}
    fused: fx.GraphModule = fuse_by_partitions(body, [dict.fromkeys(stretch) for stretch in stretches], prefix="rest_")
    for node in fused.graph.nodes:
        if node.op == "call_module" and str(node.target).startswith("rest_"):
            part: Any = torch.compile(fused.get_submodule(str(node.target)), backend=compiler, dynamic=dynamic)
            setattr(fused, str(node.target), part)
    fused.recompile()
    return fused, compiled


def _stretches(graph: fx.Graph) -> Iterator[list[fx.Node]]:
    """Calls of functions that follow each other; as they are in order, none needs what another needs before it."""
    found: list[fx.Node] = []
    for node in graph.nodes:
        if node.op == "call_function" and not _is_result(node):
            found.append(node)
        elif node.op == "call_module":
            if found:
                yield found
            found = []
    if found:
        yield found


def _is_result(node: fx.Node) -> bool:
    """Whether it takes one of a kernel's results, which may be a cache and no tensor."""
    source = node.args[0] if node.target is operator.getitem else None
    return isinstance(source, fx.Node) and source.op == "call_module"
