"""The repeated layers of a model, found by what its graph computes, whatever its modules are called.

A value of the residual stream is one that every path from the input to the output goes through. Between two such
neighbours lies a *segment*; segments that compute the same, each with its own weights, repeat from layer to layer. What
does not depend on the stream (masks, rotary tables, sizes) is *context*: it is read, and belongs to no layer.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import fx

from graphwright.ir.names import op_name
from graphwright.ir.program import Program
from graphwright.ir.provenance import path_of
from graphwright.ir.types import VAL

# Chooses rows of the stream for which the rest is computed; layers before and behind it are alike.
_SELECT = "graphwright.select_rows"
# Operators that look rows of a weight up.
_TABLES = frozenset({"aten.embedding", "graphwright.embedding_nbits"})


@dataclass(frozen=True)
class Segment:
    """What stands between two neighbouring values of the residual stream.

    Attributes:
        entry: the value that enters.
        exit: the value that leaves; nothing else that is computed here is read by later segments.
        nodes: the calls, in an order that depends on what is computed only: those of segments with equal ``form``
            correspond to each other one by one.
        weights: the ``get_attr`` nodes, likewise.
        inputs: the program's inputs that are read, likewise, such as caches.
        aside: calls that no value of the stream depends on (checks of metadata), or that select rows.
        form: what is computed, up to numbers and sizes.
    """

    entry: fx.Node
    exit: fx.Node
    nodes: tuple[fx.Node, ...]
    weights: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    aside: tuple[fx.Node, ...]
    form: tuple[Any, ...]


@dataclass(frozen=True)
class Layer:
    """Consecutive segments that repeat.

    Attributes:
        segments: in order; at least one.
    """

    segments: tuple[Segment, ...]

    @property
    def entry(self) -> fx.Node:
        """The value of the residual stream that enters."""
        return self.segments[0].entry

    @property
    def exit(self) -> fx.Node:
        """The value of the residual stream that leaves."""
        return self.segments[-1].exit

    @cached_property
    def nodes(self) -> tuple[fx.Node, ...]:
        """The calls; those of a stack's layers correspond one by one."""
        return tuple(node for segment in self.segments for node in segment.nodes)

    @cached_property
    def weights(self) -> tuple[fx.Node, ...]:
        """The ``get_attr`` nodes, likewise; one that several segments read stands here several times."""
        return tuple(node for segment in self.segments for node in segment.weights)

    @cached_property
    def inputs(self) -> tuple[fx.Node, ...]:
        """The program's inputs that are read, likewise."""
        return tuple(node for segment in self.segments for node in segment.inputs)

    @cached_property
    def aside(self) -> tuple[fx.Node, ...]:
        """Calls that belong here without a counterpart in every layer."""
        return tuple(node for segment in self.segments for node in segment.aside)

    @property
    def path(self) -> str:
        """Module path that all its calls have in common; empty where they have none."""
        paths = [path_of(node).split(".") for node in self.nodes if path_of(node)]
        common: list[str] = []
        for parts in zip(*paths, strict=False):
            if len(set(parts)) > 1:
                break
            common.append(parts[0])
        return ".".join(common)


@dataclass(frozen=True)
class Stack:
    """Layers that follow each other and compute the same, each with weights of its own.

    Attributes:
        layers: at least two; each one's exit is the next one's entry.
    """

    layers: tuple[Layer, ...]

    def __str__(self) -> str:
        """``12 layers of 31 calls, model.layers.0 to model.layers.11``."""
        first, last = self.layers[0], self.layers[-1]
        paths = (
            f"{first.path} to {last.path}" if first.path and last.path else f"%{first.entry.name} to %{last.exit.name}"
        )
        return f"{len(self.layers)} layers of {len(first.nodes)} calls, {paths}"


def find_stacks(program: Program) -> tuple[Stack, ...]:
    """The repeated layers of a program, the stack with most calls first.

    A stack's layers compute the same up to numbers and sizes, so layers whose windows or widths differ are found too. A
    layer has a weight of at least two dimensions. Where a period can begin at several places, as in post-norm models,
    whose embeddings end with a norm like those of the layers, it begins with such a weight.
    """
    order = {node: place for place, node in enumerate(program.nodes)}
    parameters = _after_parameters(program)
    found: list[Stack] = []
    seen: set[fx.Node] = set()
    for source in _sources(program):
        if seen and seen.issuperset(user for user in source.users if user.op == "call_function"):
            continue
        best: list[Stack] = []
        for target in _targets(program):
            stacks = list(_repeats(_segments(source, target, order, parameters)))
            if sum(map(_calls, stacks)) > sum(map(_calls, best)):
                best = stacks
        found += best
        seen.update(node for stack in best for layer in stack.layers for node in (*layer.nodes, *layer.aside))
    chosen: list[Stack] = []
    taken: set[fx.Node] = set()
    for stack in sorted(found, key=_calls, reverse=True):
        nodes = {node for layer in stack.layers for node in layer.nodes}
        if taken.isdisjoint(nodes):
            chosen.append(stack)
            taken |= nodes
    return tuple(chosen)


def _calls(stack: Stack) -> int:
    return len(stack.layers) * len(stack.layers[0].nodes)


# -- from where to where -----------------------------------------------------------------------------------------------


def _is_tensor(node: fx.Node) -> bool:
    """Whether a call works on tensors and does not give a size; checks of metadata give nothing."""
    if node.op != "call_function":
        return False
    if VAL in node.meta:
        return node.meta[VAL] is None or isinstance(node.meta[VAL], torch.Tensor | tuple | list)
    return not op_name(node).startswith(("py.", "aten.sym_")) or op_name(node) == "py.getitem"


def _is_floating(node: fx.Node) -> bool:
    value = node.meta.get(VAL)
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _sources(program: Program) -> Iterator[fx.Node]:
    """Where a stream may begin: floating inputs, and the first floating values that are computed from others."""
    for node in program.nodes:
        if node.op == "placeholder" and _is_floating(node):
            yield node
        elif node.op == "call_function" and _is_floating(node):
            if not any(_is_floating(each) for each in node.all_input_nodes if each.op != "get_attr"):
                yield node


def _targets(program: Program) -> list[fx.Node]:
    """Outputs that a stream may end in: the first, and the one that is computed last."""
    results: list[fx.Node] = []
    fx.node.map_arg(program.output.args, results.append)
    calls = [node for node in dict.fromkeys(results) if _is_tensor(node)]
    return list(dict.fromkeys((calls[0], max(calls)))) if calls else []


def _after_parameters(program: Program) -> set[fx.Node]:
    """Calls that depend on a trained weight."""
    found: set[fx.Node] = set()
    for node in program.nodes:
        if node.op == "get_attr":
            trained = isinstance(program.tensor(node), torch.nn.Parameter)
        else:
            trained = any(each in found for each in node.all_input_nodes)
        if trained:
            found.add(node)
    return found


# -- segments ----------------------------------------------------------------------------------------------------------


def _segments(
    source: fx.Node, target: fx.Node, order: Mapping[fx.Node, int], parameters: set[fx.Node]
) -> list[Segment]:
    """The stretches between values that every path from source to target goes through."""
    after = _closure(source, forwards=True)
    stream = sorted(after & _closure(target, forwards=False), key=order.__getitem__)
    if target not in after or len(stream) < 3:
        return []
    place = {node: index for index, node in enumerate(stream)}
    cuts, reach = [0], 0
    for index, node in enumerate(stream):
        # No edge leads past this value: whatever comes later is computed from it.
        if index and reach <= index:
            cuts.append(index)
        reach = max(reach, *(place[user] for user in node.users if user in place), 0)
    owner = {node: number for number, (a, b) in enumerate(itertools.pairwise(cuts)) for node in stream[a + 1 : b + 1]}
    asides: dict[int, list[fx.Node]] = {}
    for node in sorted(after - set(stream), key=order.__getitem__):
        numbers = [
            _read_in(each, owner, stream, cuts) for each in node.all_input_nodes if each in owner or each is source
        ]
        owner[node] = max(numbers, default=-1)
        asides.setdefault(owner[node], []).append(node)
    private = _private(owner, order, parameters)
    return [
        _form(stream[a], stream[b], number, owner, private, asides.get(number, []))
        for number, (a, b) in enumerate(itertools.pairwise(cuts))
    ]


def _read_in(node: fx.Node, owner: Mapping[fx.Node, int], stream: Sequence[fx.Node], cuts: Sequence[int]) -> int:
    """The segment that a reader of this value belongs to."""
    number = owner.get(node, -1)
    return number + 1 if number + 1 < len(cuts) and stream[cuts[number + 1]] is node else number


def _closure(start: fx.Node, *, forwards: bool) -> set[fx.Node]:
    """What depends on a value, or what it depends on, through tensors."""
    found, waiting = {start}, [start]
    while waiting:
        node = waiting.pop()
        for each in node.users if forwards else node.all_input_nodes:
            if each not in found and (_is_tensor(each) or each.op == "placeholder"):
                found.add(each)
                waiting.append(each)
    return found


def _private(
    owner: Mapping[fx.Node, int], order: Mapping[fx.Node, int], parameters: set[fx.Node]
) -> dict[fx.Node, int]:
    """Calls outside the stream that depend on trained weights and are read in one segment only -> its number."""
    found: dict[fx.Node, int] = {}
    for node in sorted(
        (each for each in parameters if _is_tensor(each) and each not in owner), key=order.__getitem__, reverse=True
    ):
        readers = {owner.get(user, found.get(user, -1)) for user in node.users}
        if len(readers) == 1 and -1 not in readers:
            found[node] = readers.pop()
    return found


def _form(
    entry: fx.Node,
    exit_: fx.Node,
    number: int,
    owner: Mapping[fx.Node, int],
    private: Mapping[fx.Node, int],
    aside: Sequence[fx.Node],
) -> Segment:
    """Walk back from what leaves, operand by operand; the order of the walk does not depend on where calls stand."""
    names: dict[fx.Node, tuple[str, int]] = {entry: ("entry", 0)}
    kinds: dict[str, list[fx.Node]] = {"call": [], "weight": [], "input": [], "context": []}
    tokens: list[Any] = []
    selections: list[fx.Node] = []

    def is_inside(node: fx.Node) -> bool:
        return node is not entry and (owner.get(node) == number or private.get(node) == number)

    def name(node: fx.Node, kind: str) -> tuple[str, int]:
        if node not in names:
            names[node] = (kind, len(kinds[kind]))
            kinds[kind].append(node)
        return names[node]

    def token(value: Any) -> Any:
        if isinstance(value, fx.Node):
            value = _behind_selection(value, entry)
            if value in names:
                return names[value]
            kind = {"get_attr": "weight", "placeholder": "input"}.get(value.op, "context")
            return name(value, kind)
        if isinstance(value, tuple | list):
            return tuple(token(item) for item in value)
        return None if value is None else "#"

    waiting: list[fx.Node] = [_behind_selection(exit_, entry)]
    while waiting:
        node = waiting[-1]
        if node in names:
            waiting.pop()
            continue
        operands = [_behind_selection(each, entry) for each in node.all_input_nodes]
        missing = [each for each in operands if is_inside(each) and each not in names]
        if missing:
            waiting.extend(reversed(missing))
            continue
        arguments = (
            tuple(map(token, node.args)),
            tuple((key, token(each)) for key, each in sorted(node.kwargs.items())),
        )
        tokens.append((op_name(node), *arguments))
        name(node, "call")
        waiting.pop()
    for node in owner:
        if owner[node] == number and op_name(node) == _SELECT:
            selections.append(node)
    return Segment(
        entry,
        exit_,
        tuple(kinds["call"]),
        tuple(kinds["weight"]),
        tuple(kinds["input"]),
        (*aside, *selections),
        tuple(tokens),
    )


def _behind_selection(node: fx.Node, entry: fx.Node) -> fx.Node:
    while node is not entry and op_name(node) == _SELECT and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


# -- repetition --------------------------------------------------------------------------------------------------------


def _repeats(segments: Sequence[Segment]) -> Iterator[Stack]:
    """The stack with most calls among these segments, and those before and behind it."""
    forms: dict[tuple[Any, ...], int] = {}
    labels = [forms.setdefault(segment.form, len(forms)) for segment in segments]
    best: tuple[int, int, int, int] | None = None  # calls, period, start, layers
    for period in range(1, len(labels) // 2 + 1):
        for start, length in _runs(labels, period):
            spare, layers = length % period, length // period
            start = _beginning(segments, start, period, spare)
            calls = sum(len(each.nodes) for each in segments[start : start + layers * period])
            if _has_matrix(segments[start : start + period]) and (best is None or calls > best[0]):
                best = calls, period, start, layers
    if best is None:
        return
    _, period, start, layers = best
    end = start + layers * period
    yield from _repeats(segments[:start])
    yield Stack(tuple(Layer(tuple(segments[at : at + period])) for at in range(start, end, period)))
    yield from _repeats(segments[end:])


def _runs(labels: Sequence[int], period: int) -> Iterator[tuple[int, int]]:
    """Starts and lengths of the longest stretches that repeat with a period at least once."""
    start = 0
    for index in range(len(labels) - period + 1):
        same = index + period < len(labels) and labels[index] == labels[index + period]
        if same:
            continue
        if index - start >= period:
            yield start, index - start + period
        start = index + 1


def _beginning(segments: Sequence[Segment], start: int, period: int, spare: int) -> int:
    """Where a layer begins, if a run is up to a period longer than its layers: not with a norm that ends the last."""
    for first in range(start, start + spare + 1):
        weighted = next((each for each in segments[first : first + period] if each.weights), None)
        if weighted is not None and _has_matrix([weighted]):
            return first
    return start


def _has_matrix(segments: Sequence[Segment]) -> bool:
    """Whether a value is multiplied by a weight: tables that are looked up and added do not make a layer."""
    for segment in segments:
        for weight in segment.weights:
            value = weight.meta.get(VAL)
            looked_up = all(op_name(user) in _TABLES for user in weight.users)
            if isinstance(value, torch.Tensor) and value.dim() >= 2 and not looked_up:
                return True
    return False
