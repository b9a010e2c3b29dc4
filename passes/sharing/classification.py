"""The pass that classifies the output of every repetition, for training and for depths to choose from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx
from torch.utils import _pytree as pytree

from graphwright.ir.errors import InputError
from graphwright.ir.program import Program
from graphwright.ir.repetitions import Sharing, repetitions_of
from graphwright.ir.rewriter import Rewriter
from graphwright.ir.types import VAL
from graphwright.passes.base import Pass
from graphwright.passes.contract import Contract, Retrain
from graphwright.passes.sharing.choosing import choose_stack
from graphwright.passes.sharing.losses import repetition_weights

# The output that the pass adds.
OUTPUT = "repetition_logits"
_TAG = "classifier/"


@dataclass(frozen=True, kw_only=True)
class ClassifyRepetitions(Pass):
    """Apply what follows the last layer (final norm, classifier, loss) to the output of every repetition as well.

    ::

        %first = aten.add.Tensor(%x, %f)                    the end of the first repetition
        %last = aten.add.Tensor(%y, %g)                     the end of the last
        %logits = aten.linear(graphwright.rms_norm(%last, %norm), %head)
        return {"logits": %logits}
        ->
        %early = aten.linear(graphwright.rms_norm(%first, %norm), %head)
        return {"logits": %logits, "repetition_logits": [%early, %logits]}

    A program that was traced with labels gives ``L_w = Σ w_i L_i`` in place of its loss (Hooper et al., SPEED), so any
    loop trains it, transformers' ``Trainer`` included; another one is trained with :func:`repetition_loss`. The
    output becomes a ``dict`` with the names that it had, and ``repetition_logits``, one for each repetition.

    Run it on a clone: that shares the weights, so that what trains is the program itself, which stays as it is decoded.
    It does not fire on a program that has these outputs already, or only one repetition.

    Attributes:
        weights: ``w_i``, one for each repetition, or ``None`` for ``i / Σ i``; they are divided by their sum.
        every: for a model whose layers share nothing: take this many layers for a repetition.
    """

    name: ClassVar[str] = "classify-repetitions"
    contract: ClassVar[Contract] = Retrain()
    respects: ClassVar[frozenset[str]] = frozenset()
    not_after: ClassVar[Mapping[str, str]] = {
        "hoist-row-selection": "its last layer is computed for the wanted rows only; classify first"
    }

    weights: tuple[float, ...] | None = None
    every: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights is not None:
            object.__setattr__(self, "weights", tuple(self.weights))
            repetition_weights(len(self.weights), self.weights)
        if self.every is not None and (
            isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 1
        ):
            raise InputError(f"must be a number of layers, not {self.every!r}", where=f"{self.name}: every")

    def run(self, program: Program) -> bool:
        """Add the outputs.

        Raises:
            ProgramError: the layers share nothing, and ``every`` does not say how many make a repetition.
            InputError: as many weights as repetitions are needed; no output depends on the last layer alone.
        """
        if OUTPUT in _names(program):
            return False
        exits = self._exits(program)
        if len(exits) < 2:
            return False
        weights = repetition_weights(len(exits), self.weights)
        with program.edit() as rewriter:
            tail = _tail(program, exits[-1])
            results = program.results
            copies = [_again(rewriter, tail, exits[-1], exit_, at) for at, exit_ in enumerate(exits[:-1])]
            logits = _logits(program, results, set(tail))
            names = {item: leaf for leaf, item in enumerate(results)}
            for item in dict.fromkeys(results):
                if isinstance(item, fx.Node) and item in tail and _is_loss(item):
                    results[names[item]] = _weighted(rewriter, [*(copy[item] for copy in copies), item], weights)
            _set_output(program, results, [*(copy[logits] for copy in copies), logits])
            rewriter.changed = True
        program.notes["repetitions"] = len(exits)
        return True

    def _exits(self, program: Program) -> list[fx.Node]:
        if Sharing.find(program) is not None and self.every is None:
            return [repetition.exit for repetition in repetitions_of(program)]
        if self.every is None:
            repetitions_of(program)  # says that there are none
        stack = choose_stack(program, self.selected(program), self.name)
        if len(stack.layers) % (self.every or 1):
            raise InputError(f"{len(stack.layers)} layers are no multiple of {self.every}", where=f"{self.name}: every")
        return [layer.exit for layer in stack.layers[(self.every or 1) - 1 :: self.every]]


def _names(program: Program) -> set[str]:
    dummy = pytree.tree_unflatten(list(range(program.signature.out_spec.num_leaves)), program.signature.out_spec)
    return set(dummy) if isinstance(dummy, Mapping) else set()


def _tail(program: Program, last: fx.Node) -> list[fx.Node]:
    """The calls behind the last layer that outputs depend on, in order."""
    wanted: set[fx.Node] = set()
    waiting = list(program.output.all_input_nodes)
    while waiting:
        node = waiting.pop()
        if node not in wanted and node is not last:
            wanted.add(node)
            waiting += node.all_input_nodes
    behind = {last}
    tail: list[fx.Node] = []
    for node in program.nodes:
        if node.op == "call_function" and any(each in behind for each in node.all_input_nodes):
            behind.add(node)
            if node in wanted:
                tail.append(node)
    return tail


def _again(
    rewriter: Rewriter, tail: Sequence[fx.Node], last: fx.Node, exit_: fx.Node, at: int
) -> dict[fx.Node, fx.Node]:
    """The tail once more, behind another value."""
    copies = {last: exit_}
    for node in tail:
        args, kwargs = (fx.node.map_arg(each, lambda item: copies.get(item, item)) for each in (node.args, node.kwargs))
        copies[node] = rewriter.call(node.target, *args, like=node, tags=(f"{_TAG}{at}",), **kwargs)  # type: ignore[arg-type]
    return copies


def _logits(program: Program, results: Sequence[Any], tail: set[fx.Node]) -> fx.Node:
    """The output to have for every repetition: that of this name, or the first that is no single number."""
    named = dict(zip(program.signature.output_names(), results, strict=True))
    fit = [item for item in results if isinstance(item, fx.Node) and item in tail and not _is_loss(item)]
    found = named.get("logits")
    if isinstance(found, fx.Node) and found in fit:
        return found
    if not fit:
        raise InputError(
            "no output is computed from what the last layer gives",
            where=f"classify-repetitions: program {program.title!r}",
            hint="trace a model with its classifier",
        )
    return fit[0]


def _is_loss(node: fx.Node) -> bool:
    value = node.meta.get(VAL)
    return isinstance(value, torch.Tensor) and value.dim() == 0 and value.is_floating_point()


def _weighted(rewriter: Rewriter, losses: Sequence[fx.Node], weights: Sequence[float]) -> fx.Node:
    """``Σ w_i L_i``."""
    total: fx.Node | None = None
    for loss, weight in zip(losses, weights, strict=True):
        part = rewriter.call("aten.mul.Tensor", loss, weight, like=loss)
        total = part if total is None else rewriter.call("aten.add.Tensor", total, part, like=loss)
    assert total is not None
    return total


def _set_output(program: Program, results: list[Any], logits: Sequence[fx.Node]) -> None:
    """Give a dict of what there was, with the logits of all repetitions behind it."""
    signature = program.signature
    given = pytree.tree_unflatten(list(range(len(results))), signature.out_spec)
    if not isinstance(given, Mapping):
        names = signature.output_names()
        given = dict(zip(names if len(names) > 1 else ["logits"], range(len(results)), strict=True))
    known = len(results)
    new = {**given, OUTPUT: list(range(known, known + len(logits)))}
    flat, spec = pytree.tree_flatten(new)
    everything = [*results, *logits]
    program.output.args = (tuple(everything[leaf] for leaf in flat),)
    program.signature = dataclasses.replace(signature, out_spec=spec)
