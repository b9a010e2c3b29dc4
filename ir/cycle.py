"""Which layers of a decoder are the same: equal calls on the same weights, found in the graph and not by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import fx

from graphwright.ir.arguments import argument
from graphwright.ir.decoder import DecoderLayout
from graphwright.ir.errors import ProgramError
from graphwright.ir.names import op_name
from graphwright.ir.program import Program
from graphwright.ir.types import ScalarType, TensorType

_SELECT = "graphwright.select_rows"

# Operators that give their operand where its type is theirs already. Tracing leaves them at some layers only.
_CASTS = frozenset({"aten.alias", "aten.detach", "aten.to.device", "aten.to.dtype"})


@dataclass(frozen=True)
class Cycle:
    """A decoder's layers as a group that is repeated.

    Attributes:
        layers: of the group.
        repeats: how often it runs, at least 2.
        begin: the hidden state that enters the first group, ``[batch, tokens, D]``.
        end: what leaves it.
        last: what leaves the last one; of wanted rows only where rows are selected within it.
    """

    layers: int
    repeats: int
    begin: fx.Node
    end: fx.Node
    last: fx.Node


def find_cycle(program: Program, layout: DecoderLayout) -> Cycle:
    """The shortest group of layers whose repetition the decoder is.

    Two layers are the same where their outputs are the same expression of their inputs: operators, constants and
    weights, whatever nodes are called and in whatever order they stand.

    Args:
        program: a decoding step.
        layout: its layout.

    Raises:
        ProgramError: layers are not joined by one value, or are no cycle; the message has their order.
    """
    where = f"program {program.title!r}"
    found = _Layers(program, layout)
    boundaries = found.boundaries()
    expressions, ends = found.expressions(boundaries)
    count = layout.layers
    for layers in range(1, count // 2 + 1):
        if count % layers:
            continue
        same = all(expressions[index] == expressions[index % layers] for index in range(count - 1))
        if same and expressions[layers - 1] in ends:
            last = ends[expressions[layers - 1]]
            return Cycle(layers, count // layers, boundaries[0], boundaries[layers], last)
    order, distinct = _order(expressions, ends)
    if distinct == count:
        raise ProgramError(
            f"has {count} layers, and none is repeated",
            where=where,
            hint="pipelined decoding needs layers that share their weights: share them and train, or decode without it",
        )
    raise ProgramError(
        f"runs its layers in the order {order}, which is no group repeated from its beginning",
        where=where,
        hint="a stage takes tokens at different depths through the same layers at once: share layers as a cycle, such "
        "as 1 2 1 2, or decode without it",
    )


def _order(expressions: Sequence[int], ends: dict[int, fx.Node]) -> tuple[str, int]:
    """Layers by number, and how many there are."""
    numbers: dict[int, int] = {}
    found = [numbers.setdefault(each, len(numbers) + 1) for each in expressions]
    last = next((numbers[each] for each in numbers if each in ends), len(numbers) + 1)
    found.append(last)
    return " ".join(map(str, found)), max(found)


class _Layers:
    def __init__(self, program: Program, layout: DecoderLayout) -> None:
        self.program, self.layout = program, layout
        self.nodes = program.nodes
        self.place = {node: index for index, node in enumerate(self.nodes)}
        inputs = program.inputs
        self.rows = inputs[3]
        self.caches = {node: index % layout.layers for index, node in enumerate(layout.caches(program))}
        self.content = self._content(inputs[0])
        self.numbers: dict[Any, int] = {}
        self.outside: dict[fx.Node, int] = {}
        self.cuts = self._cuts()

    def boundaries(self) -> list[fx.Node]:
        """What enters each layer: the last value before its cache through which all content passes."""
        firsts = [len(self.nodes)] * self.layout.layers
        for cache, layer in self.caches.items():
            firsts[layer] = min(firsts[layer], *(self.place[user] for user in cache.users))
        found: list[fx.Node] = []
        for layer, first in enumerate(firsts):
            before = [node for node, at in self.cuts if at < first]
            kind = self.program.type_of(before[-1]) if before else None
            wanted = self.program.type_of(found[0]) if found else None
            is_state = isinstance(kind, TensorType) and kind.dtype.is_floating_point and len(kind.shape) == 3
            if not is_state or (wanted is not None and kind != wanted) or (found and before[-1] in found):
                raise ProgramError(
                    f"has no single value [batch, tokens, features] that enters layer {layer}",
                    where=f"program {self.program.title!r}",
                    hint="pipelined decoding needs layers that follow one another; decode without it",
                )
            found.append(before[-1])
        return found

    def expressions(self, boundaries: Sequence[fx.Node]) -> tuple[list[int], dict[int, fx.Node]]:
        """A number for what each layer but the last computes, and for each value where the last one may end."""
        found = [self._numbered(layer, begin, end)[end] for layer, (begin, end) in enumerate(pairwise(boundaries))]
        begin, layer = boundaries[-1], self.layout.layers - 1
        uses = [self.place[user] for cache, index in self.caches.items() if index == layer for user in cache.users]
        places = [(node, at) for node, at in self.cuts if at > max(uses)]
        numbers = self._numbered(layer, begin, None)
        ends: dict[int, fx.Node] = {}
        for node, _ in places:
            ends.setdefault(numbers[node], node)
        return found, ends

    def _content(self, ids: fx.Node) -> set[fx.Node]:
        """Values that depend on what the tokens are, not only on how many there are and where."""
        found = {ids, *self.caches}
        for node in self.nodes:
            if node.op == "call_function" and not isinstance(self.program.type_of(node), ScalarType):
                if any(source in found for source in node.all_input_nodes):
                    found.add(node)
        return found

    def _cuts(self) -> list[tuple[fx.Node, int]]:
        """Values through which all content passes that is computed before them, and where they are alone."""
        last = {
            node: max((self.place[user] for user in node.users if user.op != "output"), default=-1)
            for node in self.content
        }
        # Caches are always there: what enters them again is read by their own layer alone.
        live: set[fx.Node] = set()
        cuts: dict[fx.Node, int] = {}
        for at, node in enumerate(self.nodes):
            if node in self.content and node not in self.caches and last[node] > at:
                live.add(node)
            live = {each for each in live if last[each] > at}
            if len(live) == 1 and node.op == "call_function":
                (only,) = live
                cuts.setdefault(only, at)
        return list(cuts.items())

    def _numbered(self, layer: int, begin: fx.Node, end: fx.Node | None) -> dict[fx.Node, int]:
        """Equal expressions of what enters a layer have equal numbers."""
        stop = len(self.nodes) if end is None else self.place[end] + 1
        inside: dict[fx.Node, int] = {begin: self._number("begin")}
        for cache, index in self.caches.items():
            inside[cache] = self._number("cache", index - layer, str(cache.target).partition("_")[0])

        def known(node: fx.Node) -> int:
            return inside[node] if node in inside else self.outside.setdefault(node, self._number("other", node.name))

        for node in self.nodes[:stop]:
            target = inside if node in self.content else self.outside
            if node in target or (node in self.content and self.place[node] < self.place[begin]):
                continue
            kind = self.program.type_of(node)
            if isinstance(kind, ScalarType):
                target[node] = self._number("size", kind.expression)
            elif node.op in ("get_attr", "placeholder"):
                target[node] = self._number(node.op, str(node.target))
            elif node.op == "call_function" and op_name(node) == _SELECT and argument(node, "rows") is self.rows:
                target[node] = known(argument(node, "x"))
            elif op_name(node) in _CASTS and kind == self.program.type_of(argument(node, "self")):
                target[node] = known(argument(node, "self"))
            elif node.op == "call_function":
                target[node] = self._number(op_name(node), repr(_operands(node, known)))
        return inside

    def _number(self, *key: Any) -> int:
        return self.numbers.setdefault(key, len(self.numbers))


@dataclass(frozen=True)
class _Number:
    value: int


def _operands(node: fx.Node, known: Callable[[fx.Node], int]) -> Any:
    """What a node is called with, numbers in place of nodes."""
    number: Callable[[fx.Node], Any] = lambda each: _Number(known(each))  # noqa: E731 - its type is what matters
    return fx.node.map_arg((node.args, node.kwargs), number)
