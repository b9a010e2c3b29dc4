"""Decoding whose later tokens run through fewer layers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphwright.backends.reference.session import ReferenceSession
from graphwright.ir.copying import copy_graph
from graphwright.ir.errors import InputError
from graphwright.ir.program import Program
from graphwright.ir.stacks import Stack, find_stacks


@dataclass(frozen=True)
class DepthSchedule:
    """How many layers the token at each place of an answer runs through: ``max(floor, ⌊L · alphaⁱ⌋)``, for i from 0 on
    (D3, the power law of positions). It changes what a model says.

    Attributes:
        alpha: above 0, at most 1; with 1 every token runs through all layers.
        floor: least number of layers; at least 1.
        step: layers go in multiples of this, rounded up: those of one repetition, where the classifier was trained on
            repetitions only.
    """

    alpha: float = 1.0
    floor: int = 1
    step: int = 1

    def __post_init__(self) -> None:
        if not (math.isfinite(self.alpha) and 0 < self.alpha <= 1):
            raise InputError(f"must be above 0 and at most 1, not {self.alpha!r}", where="DepthSchedule: alpha")
        for name in ("floor", "step"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"must be a number of layers, not {value!r}", where=f"DepthSchedule: {name}")

    def depth(self, layers: int, place: int) -> int:
        """Layers for the token at this place of an answer, of a model that has so many."""
        wanted = max(self.floor, math.floor(layers * self.alpha ** max(place, 0)), 1)
        return min(layers, -(-wanted // self.step) * self.step)


class ScheduledSession(ReferenceSession):
    """A step program of which a token runs the first layers only, as a schedule says; norm and classifier follow.

    A step of several tokens is a prompt and runs through all layers; the tokens after it count from 0. Since depth only
    falls from token to token, every layer that runs finds the keys and values of all tokens before. Tokens that are
    taken back count again from where the next step starts.

    Args:
        program: a decoding step, before rows are selected early (``PrepareDecoder``).
        schedule: depth by place.
        slots: sequences held at a time.
        capacity: tokens that each can hold.

    Raises:
        ProgramError: the program is not a decoding step.
        InputError: it has no repeated layers, or its last one computes selected rows only.
    """

    def __init__(self, program: Program, schedule: DepthSchedule, *, slots: int, capacity: int) -> None:
        super().__init__(program, slots=slots, capacity=capacity)
        stacks = find_stacks(program)
        if not stacks:
            raise InputError("has no repeated layers", where=f"program {program.title!r}")
        self.schedule, self.stack = schedule, stacks[0]
        if any(node.users for node in self.stack.layers[-1].aside):
            raise InputError(
                "its last layer computes selected rows only, so what is before it cannot take its place",
                where=f"program {program.title!r}",
                hint="make the session before PrepareDecoder",
            )
        self._bodies: dict[int, fx.GraphModule] = {len(self.stack.layers): program.body}
        self._origins = [0] * slots
        self.depths: list[int] = []

    def _step(
        self, tokens: torch.Tensor, slots: torch.Tensor, starts: torch.Tensor, rows: torch.Tensor
    ) -> torch.Tensor:
        total, count = len(self.stack.layers), tokens.shape[1]
        wanted: dict[int, list[int]] = {}
        for row, (slot, start) in enumerate(zip(slots.tolist(), starts.tolist(), strict=True)):
            if count > 1 or start == 0:
                self._origins[slot] = start + count
                depth = total
            else:
                self._origins[slot] = min(self._origins[slot], start)
                depth = self.schedule.depth(total, start - self._origins[slot])
            wanted.setdefault(depth, []).append(row)
        logits = torch.empty(*rows.shape, self.layout.vocabulary)
        for depth, chosen in wanted.items():
            at = torch.tensor(chosen)
            with torch.no_grad():
                found, *caches = self._body(depth)(tokens[at], slots[at], starts[at], rows[at], *self._caches)
            self._caches = list(caches)
            logits[at] = found.float()
            self.depths += [depth] * len(chosen)
        return logits

    def _body(self, depth: int) -> fx.GraphModule:
        if depth not in self._bodies:
            self._bodies[depth] = truncated(self.program, self.stack, depth)
        return self._bodies[depth]

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` positions of one slot to another."""
        super().copy(source, target, length)
        self._origins[target] = min(self._origins[source], length)


def truncated(program: Program, stack: Stack, depth: int) -> fx.GraphModule:
    """The first layers of a decoding step with what follows the last; caches of the others come back as they were.

    Args:
        program: a decoding step.
        stack: its layers.
        depth: how many run; at least one.

    Returns:
        a graph over the program's tensors, called like the program's body.
    """
    graph = copy_graph(program.graph)
    nodes = {node.name: node for node in graph.nodes}
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    last, early = nodes[stack.layers[-1].exit.name], nodes[stack.layers[depth - 1].exit.name]
    skipped = {node.name for layer in stack.layers[depth:] for node in layer.nodes}
    last.replace_all_uses_with(early, delete_user_cb=lambda user: user.name not in skipped)
    output = graph.output_node()
    results: Any = output.args[0]
    caches = inputs[len(inputs) - len(results) + 1 :]
    kept = [cache if new.name in skipped else new for cache, new in zip(caches, results[1:], strict=True)]
    output.args = ((results[0], *kept),)
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and not node.users:
            graph.erase_node(node)
    return fx.GraphModule(program.body, graph)
