"""Lowering a program to the C++ kernels; what has none runs in PyTorch, and ``explain()`` says so."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn

from graphwright.backends.cpu.kernels import LOWERINGS, Kernel, Site
from graphwright.backends.cpu.kernels.attention import Attention
from graphwright.backends.cpu.kernels.heads import HeadsAttention
from graphwright.backends.cpu.kernels.linear import Linear
from graphwright.backends.cpu.kernels.norms import LayerNorm, RmsNorm
from graphwright.backends.cpu.spent import SpentWeights
from graphwright.backends.cpu.views import VIEWS, heads_around
from graphwright.backends.epilogues import epilogue_of, sum_before
from graphwright.backends.executable import KernelUse
from graphwright.ir import ops
from graphwright.ir.arguments import arguments_of
from graphwright.ir.names import op_name
from graphwright.ir.program import Program
from graphwright.ir.provenance import path_of
from graphwright.ir.stages import Stage, cut_stage


@dataclass(frozen=True)
class Call:
    """A kernel and what it is called with: nodes of the program, numbers or ``None``.

    Attributes:
        gives: the nodes whose values the kernel gives as a tuple; empty where it gives one value.
    """

    kernel: Kernel
    inputs: tuple[Any, ...]
    gives: tuple[fx.Node, ...] = ()


@dataclass(frozen=True)
class Lowered:
    """What was decided for a program.

    Attributes:
        calls: kernels, by the node in whose place they stand and whose value they give.
        absorbed: nodes that have no place of their own: another kernel does their work.
        uses: the kernel of every call, for ``explain()``.
        packed: weights as kernels have them, by what they were packed from.
    """

    calls: dict[fx.Node, Call]
    absorbed: frozenset[fx.Node]
    uses: tuple[KernelUse, ...]
    packed: dict[tuple[str, ...], Any] = field(default_factory=dict)


def lower(
    program: Program,
    isa: str | None,
    compute: str,
    *,
    keep_weights: bool = True,
    packed: dict[tuple[str, ...], Any] | None = None,
) -> Lowered:
    """Choose the kernels of a program and pack their weights.

    Args:
        program: what to run; stays as it is, unless it loses its weights.
        isa: instruction set of the kernels, ``None`` where there are none.
        compute, keep_weights: see :class:`graphwright.backends.cpu.CpuBackend`.
        packed: weights that another program with the same ones has packed.
    """
    spent = SpentWeights(program, keep=keep_weights)
    calls: dict[fx.Node, Call] = {}
    absorbed: set[fx.Node] = set()
    uses: dict[fx.Node, KernelUse] = {}
    packed = {} if packed is None else packed
    for node in program.nodes:
        if node.op != "call_function" or node in absorbed:
            continue
        site = Site(program, node, isa or "", compute, packed)
        found = _kernel(site)
        uses[node] = _use(node, found)
        if not isinstance(found, Kernel):
            continue
        given = arguments_of(node)
        inputs = tuple(given[name] for name in found.inputs)
        spent.packed(node, inputs)
        if isinstance(found, LayerNorm | RmsNorm) and (total := sum_before(program, node, absorbed)) is not None:
            summed, terms = found.with_residual(), arguments_of(total)
            calls.pop(total, None)
            calls[node] = Call(summed, (terms["self"], terms["other"]), (node, total))
            absorbed.add(total)
            uses[node] = _use(node, summed)
            uses[total] = _part(total, summed)
            continue
        view = heads_around(program, node) if type(found) is Attention else None
        if view is not None and isinstance(found, Attention):
            joint = HeadsAttention(site.isa, found.scale, found.causal, found.window, view.places, bool(view.after))
            last = view.after[-1] if view.after else node
            calls[last] = Call(joint, (*view.sources, *inputs[3:]))
            absorbed.update((node, *view.after))
            uses.update((each, _part(each, joint)) for each in view.after)
            continue
        if not isinstance(found, Linear):
            calls[node] = Call(found, inputs)
            continue
        epilogue = epilogue_of(program, node, absorbed)
        found.activation = epilogue.activation
        if epilogue.factor is not None or epilogue.residual is not None:
            inputs = (*inputs, epilogue.factor, epilogue.residual)
        calls[epilogue.last] = Call(found, inputs)
        absorbed.update((node, *epilogue.absorbed))
        for each in epilogue.absorbed:
            uses[each] = KernelUse(each.name, path_of(each), op_name(each), f"epilogue of {found.label}")
    for node in unused_views(program, calls, absorbed):
        absorbed.add(node)
        uses[node] = replace(uses[node], kernel="within attention")
    ordered = tuple(uses[node] for node in program.nodes if node in uses)
    return Lowered(calls, frozenset(absorbed - calls.keys()), ordered, packed)


def lower_stage(
    program: Program, packed: dict[tuple[str, ...], Any], isa: str, compute: str, *, keep_weights: bool = True
) -> tuple[Stage, Lowered]:
    """A decoder's repeated group of layers, on the weights that its step has packed, or will.

    Raises:
        ProgramError: it repeats no group of layers, or its weights have been let go of.
    """
    program.require_values()
    stage = cut_stage(program)
    return stage, lower(stage.program, isa, compute, keep_weights=keep_weights, packed=packed)


def assemble(program: Program, lowered: Lowered) -> fx.GraphModule:
    """The program with its kernels in it; weights that only kernels have used are left out."""
    graph = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    parts: dict[str, nn.Module | torch.Tensor] = {}
    for node in program.nodes:
        call = lowered.calls.get(node)
        if call is not None:
            name = f"kernel_{len(parts)}"
            parts[name] = call.kernel
            made[node] = graph.call_module(name, fx.node.map_arg(call.inputs, made.__getitem__))
            results = made[node]
            for place, each in enumerate(call.gives):
                made[each] = graph.call_function(operator.getitem, (results, place))
        elif node not in lowered.absorbed:
            made[node] = graph.node_copy(node, made.__getitem__)
    tensors = program.tensors()
    for copy in list(graph.nodes):
        if copy.op == "get_attr" and copy.users:
            parts[str(copy.target)] = tensors[str(copy.target)]
        elif copy.op == "get_attr":  # it has been packed
            graph.erase_node(copy)
    return fx.GraphModule(parts, graph, class_name=program.title)


def _kernel(site: Site) -> Kernel | str | None:
    """The kernel of a node, why it has none, or ``None`` when no kernel of ours computes such operators."""
    make = LOWERINGS.get(op_name(site.node))
    if make is None:
        return None
    return make(site) if site.isa else "the C++ kernels are not in this installation"


def unused_views(program: Program, calls: dict[fx.Node, Call], absorbed: set[fx.Node]) -> list[fx.Node]:
    """Views that only fed nodes whose kernels now read what lies before them."""
    read = {each for call in calls.values() for each in call.inputs if isinstance(each, fx.Node)}
    unused: dict[fx.Node, None] = {}
    for node in reversed(program.nodes):
        if node.op == "call_function" and op_name(node) in VIEWS and node not in read and node not in absorbed:
            if all(user in calls or user in absorbed or user in unused for user in node.users):
                unused[node] = None
    return list(unused)


def _part(node: fx.Node, kernel: Kernel) -> KernelUse:
    return KernelUse(node.name, path_of(node), op_name(node), f"part of {kernel.label}")


def _use(node: fx.Node, found: Kernel | str | None) -> KernelUse:
    name, path, op = node.name, path_of(node), op_name(node)
    if isinstance(found, Kernel):
        return KernelUse(name, path, op, found.label)
    kernel = "reference" if ops.is_dialect(node.target) else "torch"
    return KernelUse(name, path, op, kernel, found or "")
