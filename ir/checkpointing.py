"""Training with less memory: what the layers compute is not kept for the backward pass but computed again there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

from graphwright.ir.blocks import Block, blocks_of
from graphwright.ir.errors import ProgramError
from graphwright.ir.program import Program

# Where a program's records have it.
RECORD, OPTION = "training", "checkpoint_blocks"


def checkpoint_blocks(program: Program, enabled: bool = True) -> None:
    """Keep only what enters each layer while the program trains, and compute the layer again in the backward pass.

    Gradients are the same; a training step takes one more forward pass of the layers (Chen et al. 2016, "Training deep
    nets with sublinear memory cost"). Without gradients the program runs as ever. The setting is saved with the
    program and holds for its clones; see :func:`graphwright.training_memory` for what it saves.

    Args:
        program: changed in place; a layer is what :func:`graphwright.ir.blocks.blocks_of` takes for one.
        enabled: ``False`` to keep everything again.

    Raises:
        ProgramError: no layer is to be found by the module paths.
    """
    if not enabled:
        settings = program.records.get(RECORD, {})
        settings.pop(OPTION, None)
        if not settings:
            program.records.pop(RECORD, None)
        return
    if not any(block.path for block in blocks_of(program)):
        raise ProgramError(
            "has no layers whose values could be computed again",
            where=f"program {program.title!r}",
            hint="layers are modules with a number in their path, such as model.layers.3",
        )
    program.records.setdefault(RECORD, {})[OPTION] = True


def is_checkpointed(program: Program) -> bool:
    """Whether layers are computed again in the backward pass."""
    return bool(program.records.get(RECORD, {}).get(OPTION))


@dataclass(frozen=True)
class Stretch:
    """Some consecutive calls of a program, as a function.

    Attributes:
        path: module path of the layer; empty outside the layers.
        run: takes the values in ``inputs`` and gives those in ``outputs``.
        inputs: names of nodes.
        outputs: likewise.
        spent: values that nobody reads afterwards.
    """

    path: str
    run: fx.GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    spent: tuple[str, ...]


def stretches(program: Program) -> list[Stretch]:
    """A program's calls, cut into its layers and what lies outside of them."""
    blocks = blocks_of(program)
    place = {node: index for index, block in enumerate(blocks) for node in block.nodes}
    last: dict[fx.Node, int] = {}
    for node in program.nodes:
        for source in node.all_input_nodes:
            last[source] = max(last.get(source, 0), place.get(node, len(blocks)))
    return [_stretch(block, index, last) for index, block in enumerate(blocks)]


def run_stretches(
    parts: Sequence[Stretch], values: Mapping[str, Any], wanted: Any, call: Callable[[Stretch, Sequence[Any]], Any]
) -> Any:
    """Run a program cut into stretches.

    Args:
        parts: from :func:`stretches`.
        values: inputs and weights by the names of their nodes.
        wanted: the output node's argument, with nodes in it.
        call: how a stretch is run on its inputs, such as :func:`again`.

    Returns:
        ``wanted`` with values in place of the nodes.
    """
    known = dict(values)
    for part in parts:
        found = call(part, [known[name] for name in part.inputs])
        known.update(zip(part.outputs, found, strict=True))
        for name in part.spent:
            del known[name]
    return fx.node.map_arg(wanted, lambda node: known[node.name])


def again(part: Stretch, inputs: Sequence[Any]) -> Any:
    """Run a stretch so that what a layer computes is computed again in the backward pass."""
    return checkpoint(part.run, *inputs, use_reentrant=False) if part.path else part.run(*inputs)


class Checkpointed:
    """A program's graph as stretches, made anew when the graph has changed."""

    def __init__(self) -> None:
        self._code: object = None
        self._parts: list[Stretch] = []

    def __call__(self, program: Program, inputs: Sequence[torch.Tensor]) -> Any:
        """Run on flat inputs."""
        if self._code is not program.body.code:
            self._parts, self._code = stretches(program), program.body.code
        return run_stretches(self._parts, named_values(program, inputs), program.output.args[0], again)


def named_values(program: Program, inputs: Sequence[Any]) -> dict[str, Any]:
    """Inputs and weights by the names of their nodes."""
    values: dict[str, Any] = {node.name: value for node, value in zip(program.inputs, inputs, strict=True)}
    values.update({node.name: program.tensor(node) for node in program.nodes if node.op == "get_attr"})
    return values


def _stretch(block: Block, index: int, last: Mapping[fx.Node, int]) -> Stretch:
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    inside = set(block.nodes)
    sources = dict.fromkeys(source for node in block.nodes for source in node.all_input_nodes if source not in inside)
    for source in sources:
        copies[source] = graph.placeholder(source.name)
    for node in block.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    results = [node for node in block.nodes if last.get(node, -1) > index]
    graph.output(tuple(copies[node] for node in results))
    spent = [node.name for node in sources if last[node] == index]
    return Stretch(
        block.path,
        fx.GraphModule(nn.Module(), graph),
        tuple(node.name for node in sources),
        tuple(node.name for node in results),
        tuple(spent),
    )
