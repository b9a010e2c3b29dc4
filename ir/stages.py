"""A decoder that repeats a group of layers: the group cut out as a program, to be run as a pipeline stage."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from graphwright.ir.cycle import Cycle, find_cycle
from graphwright.ir.decoder import DecoderLayout
from graphwright.ir.errors import ProgramError
from graphwright.ir.names import op_name, resolve_target
from graphwright.ir.program import Program
from graphwright.ir.signature import Signature
from graphwright.ir.types import VAL, ScalarType, TensorType

# The inputs of a stage before its caches.
INPUTS = ("input_ids", "hidden", "is_new", "slots", "starts", "rows")


@dataclass(frozen=True)
class Stage:
    """One group of layers of a decoder that repeats it (SPEED, Hooper et al. 2023, section 3.2).

    The stage takes ``input_ids`` int64 ``[B, S]``, ``hidden`` ``[B, S, D]``, ``is_new`` bool ``[B]``, ``slots`` and
    ``starts`` int64 ``[B]``, ``rows`` int64 ``[B, K]``, and keys and values of the group's layers; it gives logits
    ``[B, K, V]``, the next ``hidden`` and the caches. A row that is new begins with the embedding of its tokens, any
    other with what the stage gave for them the time before. Rows stand at different repetitions: each has caches of its
    own, which are slots. The whole decoder is the stage run ``repeats`` times.

    Attributes:
        program: the stage; it shares the decoder's weights.
        layout: of the decoder.
        layers: of the group.
        repeats: how often the decoder runs it.
        width: D.
    """

    program: Program
    layout: DecoderLayout
    layers: int
    repeats: int
    width: int

    @property
    def dtype(self) -> torch.dtype:
        """Of the hidden state."""
        value: torch.Tensor = self.program.inputs[1].meta[VAL]
        return value.dtype


def cut_stage(program: Program) -> Stage:
    """Cut the repeated group out of a decoding step.

    That the repetitions compute the same is proven, not assumed: each must be the same calls on the same weights, with
    the same constants. Rows that :class:`graphwright.HoistRowSelection` selects early in the last one do not count.

    Args:
        program: a decoding step, before or after passes; it stays as it is.

    Raises:
        ProgramError: it is no decoding step, it switches adapters, or it does not repeat its layers as a cycle (then
            the message says in what order it has them).
    """
    layout = DecoderLayout.of(program)
    if layout.adapters:
        raise ProgramError(
            f"switches {layout.adapters} adapters, which stages have no place for",
            where=f"program {program.title!r}",
            hint="merge the adapters or take them out, or decode without pipeline=True",
        )
    return _Cut(program, layout, find_cycle(program, layout)).stage()


class _Cut:
    def __init__(self, program: Program, layout: DecoderLayout, found: Cycle) -> None:
        self.program, self.layout, self.found = program, layout, found
        self.graph = fx.Graph()
        self.made: dict[fx.Node, fx.Node] = {}
        self.inputs: dict[str, fx.Node] = {}

    def stage(self) -> Stage:
        program, found, layers = self.program, self.found, self.found.layers
        begin, end, last = found.begin, found.end, found.last
        results = program.results
        count = self.layout.layers
        caches = [*results[1 : 1 + layers], *results[1 + count : 1 + count + layers]]
        kind = program.type_of(begin)
        assert isinstance(kind, TensorType)
        width = kind.shape[-1]
        assert isinstance(width, int)

        self._weights([begin], ())
        self._weights([end, *caches], (begin,))
        self._weights([results[0]], (last,))
        self._inputs(kind)
        hidden = self.inputs["hidden"]
        self._copy([begin], ())
        embedded = self.made[begin]
        is_new = self._call("aten.unsqueeze", self._call("aten.unsqueeze", self.inputs["is_new"], 1), 2)
        self.made[begin] = self._call("aten.where.self", is_new, embedded, hidden)
        self._copy([end, *caches], (begin,))
        after = self.made[end]
        self.made[last] = after
        if program.type_of(last) != program.type_of(end):
            self.made[last] = self._call("graphwright.select_rows", after, self.inputs["rows"])
        self._copy([results[0]], (last,))
        self.graph.output((self.made[results[0]], after, *(self.made[each] for each in caches)))

        stage = Program(
            fx.GraphModule(nn.Module(), fx.Graph()),
            _signature(layers),
            program.symbols,
            title=f"{program.title} stage",
        )
        for node in self.graph.nodes:
            if node.op == "get_attr":
                stage.set_tensor(str(node.target), program.tensor(str(node.target)))
        stage.body.graph = self.graph
        stage.infer_types()
        stage.body.recompile()
        return Stage(stage, self.layout, layers, found.repeats, width)

    def _inputs(self, hidden: TensorType) -> None:
        symbols, given = self.program.symbols, {str(node.target): node for node in self.program.inputs}
        layers = range(self.found.layers)
        for name in (*INPUTS, *(f"keys_{i}" for i in layers), *(f"values_{i}" for i in layers)):
            if name in given:
                self.made[given[name]] = self.inputs[name] = self.graph.node_copy(given[name])
                continue
            node = self.inputs[name] = self.graph.placeholder(name)
            node.meta[VAL] = symbols.fake(hidden if name == "hidden" else TensorType(torch.bool, ("batch",)))

    def _weights(self, targets: list[fx.Node], ends: Collection[fx.Node]) -> None:
        """Weights come before all else."""
        for node in self._needed(targets, ends):
            if node.op == "get_attr" and node not in self.made:
                self.made[node] = self.graph.node_copy(node)

    def _copy(self, targets: list[fx.Node], ends: Collection[fx.Node]) -> None:
        for node in self._needed(targets, ends):
            if node in self.made:
                continue
            size = self._size(node)
            self.made[node] = self.graph.node_copy(node, self.made.__getitem__) if size is None else size

    def _needed(self, targets: list[fx.Node], ends: Collection[fx.Node]) -> list[fx.Node]:
        """What the targets are computed from, in order, without the ends and what only they need."""
        needed, stack = set[fx.Node](), list(targets)
        while stack:
            node = stack.pop()
            if node in needed or node in ends:
                continue
            needed.add(node)
            if self._size_of(node) is None:
                stack.extend(node.all_input_nodes)
        return [node for node in self.program.nodes if node in needed]

    def _size_of(self, node: fx.Node) -> tuple[str, int] | None:
        """The input and axis that have the size which this node reads from a value."""
        kind = self.program.type_of(node)
        if node.op != "call_function" or not isinstance(kind, ScalarType) or op_name(node) != "aten.sym_size.int":
            return None
        return _SIZES.get(kind.expression)

    def _size(self, node: fx.Node) -> fx.Node | None:
        place = self._size_of(node)
        if place is None:
            return None
        made = self._call("aten.sym_size.int", self.inputs[place[0]], place[1])
        made.meta.update(node.meta)
        return made

    def _call(self, target: str, *args: Any) -> fx.Node:
        return self.graph.call_function(resolve_target(target), args)


_SIZES: Mapping[str, tuple[str, int]] = {
    "batch": ("input_ids", 0),
    "tokens": ("input_ids", 1),
    "selected": ("rows", 1),
}


def _signature(layers: int) -> Signature:
    names = [*INPUTS, *(f"keys_{i}" for i in range(layers)), *(f"values_{i}" for i in range(layers))]
    given = {name: index for index, name in enumerate(INPUTS)}
    caches = {"keys": list(range(layers)), "values": list(range(layers))}
    _, in_spec = pytree.tree_flatten(((), {**given, **caches}))
    _, out_spec = pytree.tree_flatten({"logits": 0, "hidden": 0, **caches})
    return Signature(in_spec, out_spec, tuple(names), {})
