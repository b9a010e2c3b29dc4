"""Layers that share their weights: which repetition a node belongs to, and where each repetition begins and ends.

``Program.records["sharing"]`` says how layers share, and every node of a repeated layer has the tag ``repetition/r``.
Both are saved with the program and outlive other passes; where repetitions lie in the graph is found by structure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import fx

from graphwright.ir.errors import ProgramError
from graphwright.ir.program import Program
from graphwright.ir.provenance import TAGS, tags_of
from graphwright.ir.stacks import Layer, Stack, find_stacks

RECORD = "sharing"
_PREFIX = "repetition/"


@dataclass(frozen=True)
class Sharing:
    """How the layers of a program share weights.

    Attributes:
        groups: distinct layers, ``N_d``.
        repeats: how often each is used, ``G``; the program has ``groups * repeats`` layers.
        order: which layers share, see :func:`layer_order`.
        part: what is shared: ``"block"``, ``"attention"`` or ``"feed-forward"``.
    """

    groups: int
    repeats: int
    order: str = "cycle"
    part: str = "block"

    @staticmethod
    def find(program: Program) -> Sharing | None:
        """What the program's records say; ``None`` if its layers share nothing."""
        found: Mapping[str, Any] | None = program.records.get(RECORD)
        return None if found is None else Sharing(**{key: found[key] for key in ("groups", "repeats", "order", "part")})

    def record(self, program: Program) -> None:
        """Write it into the program's records."""
        program.records[RECORD] = asdict(self)


@dataclass(frozen=True)
class Repetition:
    """One pass over the distinct layers.

    Attributes:
        number: 0 for the first.
        layers: in the order in which they run.
    """

    number: int
    layers: tuple[Layer, ...]

    @property
    def entry(self) -> fx.Node:
        """The value of the residual stream that enters."""
        return self.layers[0].entry

    @property
    def exit(self) -> fx.Node:
        """The value of the residual stream that leaves; final norm and classifier read that of the last repetition."""
        return self.layers[-1].exit


def repetition_of(node: fx.Node) -> int | None:
    """The repetition that a node belongs to, from 0 on; ``None`` outside the repeated layers."""
    for tag in tags_of(node):
        if tag.startswith(_PREFIX):
            return int(tag.removeprefix(_PREFIX))
    return None


def tag_repetitions(stack: Stack, groups: int) -> None:
    """Give every node of a stack the tag of its repetition: a layer's number by the distinct ones."""
    for number, layer in enumerate(stack.layers):
        for node in (*layer.nodes, *layer.aside):
            kept = {tag for tag in tags_of(node) if not tag.startswith(_PREFIX)}
            node.meta[TAGS] = frozenset({*kept, f"{_PREFIX}{number // groups}"})


def find_shared_stack(program: Program) -> Stack | None:
    """The stack that has repetitions; ``None`` if there is none."""
    stacks = find_stacks(program)
    return next(
        (each for each in stacks if any(repetition_of(node) is not None for node in each.layers[0].nodes)), None
    )


def repetitions_of(program: Program) -> tuple[Repetition, ...]:
    """The repetitions of a program whose layers share weights, in order.

    Raises:
        ProgramError: its layers share nothing, or passes have changed them so that they are no longer alike.
    """
    sharing, stack = Sharing.find(program), find_shared_stack(program)
    if sharing is None:
        raise ProgramError(
            "has no layers that share weights",
            where=f"program {program.title!r}",
            hint="run ShareLayers or DeepenLayers on it",
        )
    wanted = sharing.groups * sharing.repeats
    if stack is None or len(stack.layers) != wanted:
        raise ProgramError(
            f"should have {sharing.groups} layers {sharing.repeats} times, but {stack or 'no layers'} are found alike",
            where=f"program {program.title!r}",
            hint="passes that change some layers only must not run on shared ones",
        )
    starts = range(0, wanted, sharing.groups)
    return tuple(Repetition(at, stack.layers[start : start + sharing.groups]) for at, start in enumerate(starts))
