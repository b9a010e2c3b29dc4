"""The pass that repeats the layers of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from graphwright.ir.decoder import DecoderLayout
from graphwright.ir.decoder_caches import Cache, add_cache, arrange_caches, cache_within, caches_of
from graphwright.ir.errors import InputError
from graphwright.ir.program import Program
from graphwright.ir.provenance import PATH, SOURCE, TAGS, tags_of
from graphwright.ir.repetitions import Sharing, tag_repetitions
from graphwright.ir.rewriter import Rewriter
from graphwright.ir.stacks import Layer, Stack
from graphwright.passes.base import Pass
from graphwright.passes.contract import Contract, Retrain
from graphwright.passes.sharing.choosing import choose_stack
from graphwright.passes.sharing.orders import check_order, layer_order


@dataclass(frozen=True, kw_only=True)
class DeepenLayers(Pass):
    """Repeat the layers of a model G times: the same weights, G times the depth.

    ::

        %a = aten.linear(%x, %layers_0_weight)
        %b = aten.linear(%a, %layers_1_weight)
        ->                                                  repeats=2, order="cycle"
        %a = aten.linear(%x, %layers_0_weight)
        %b = aten.linear(%a, %layers_1_weight)
        %c = aten.linear(%b, %layers_0_weight)
        %d = aten.linear(%c, %layers_1_weight)

    What it leaves is what :class:`ShareLayers` leaves of a model that had the depth: tags, records, and a cache for
    each repetition of a layer of a decoding step. The function changes until the model is trained. It does not fire
    with ``repeats=1``. It is an error if no block is repeated, the layers share weights already, or something behind
    the layers reads a value of theirs other than the last.

    Attributes:
        repeats: G.
        order: ``"cycle"``, ``"sequence"`` or ``"cycle-reversed"``, see :class:`ShareLayers`.
    """

    name: ClassVar[str] = "deepen-layers"
    contract: ClassVar[Contract] = Retrain()
    respects: ClassVar[frozenset[str]] = frozenset()
    not_after: ClassVar[Mapping[str, str]] = {
        "hoist-row-selection": "its last layer is computed for the wanted rows only; deepen first",
        "classify-repetitions": "the outputs that it added would be of other repetitions; classify a clone afterwards",
        "insert-adapters": "what was adapted is written down by place; deepen first",
    }

    repeats: int = 2
    order: str = "cycle"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.repeats, bool) or not isinstance(self.repeats, int) or self.repeats < 1:
            raise InputError(f"must be a number of at least 1, not {self.repeats!r}", where=f"{self.name}: repeats")
        check_order(self.order, self.name)

    def run(self, program: Program) -> bool:
        """Repeat; all or nothing.

        Raises:
            InputError: no block is repeated, the layers share weights, or a value of theirs is read from behind.
        """
        if self.repeats == 1:
            return False
        if Sharing.find(program) is not None:
            raise InputError(
                "the layers share weights already",
                where=self.name,
                hint="give the wanted number of repetitions the first time",
            )
        stack = choose_stack(program, self.selected(program), self.name)
        groups = len(stack.layers)
        order = layer_order(groups, self.repeats, self.order)
        with program.edit() as rewriter:
            layers = repeat(rewriter, stack, order, self.name)
            tag_repetitions(Stack(tuple(layers)), groups)
            Sharing(groups, self.repeats, self.order).record(program)
            rewriter.retype()
        program.notes.update({"layers": len(order), "groups": groups, "repeats": self.repeats})
        return True


def check_contained(stack: Stack, where: str) -> None:
    """Check that layers can be put elsewhere: nothing but the next one reads what a layer computes, caches excepted.

    Raises:
        InputError: something does; names it.
    """
    for number, layer in enumerate(stack.layers):
        read = [node for node in layer.aside if node.users]
        if read:
            raise InputError(
                f"%{read[0].name} of layer {number} is read outside of the layers",
                where=where,
                hint="run it before passes that select rows (PrepareDecoder) or add outputs (ClassifyRepetitions)",
            )
        if number + 1 < len(stack.layers) and any(user.op == "output" for user in layer.exit.users):
            raise InputError(
                f"what layer {number} gives is an output of the program",
                where=where,
                hint="trace the model without output_hidden_states",
            )


def repeat(rewriter: Rewriter, stack: Stack, order: Sequence[int], where: str) -> list[Layer]:
    """Let the layers run in this order, in which each occurs; returns them, copies included."""
    program = rewriter.program
    check_contained(stack, where)
    layout = DecoderLayout.find(program)
    caches = caches_of(layout, program.inputs, program.results) if layout is not None else []
    own = [cache_within(layer, caches) for layer in stack.layers]
    inside = [{*layer.nodes, *layer.aside} for layer in stack.layers]
    behind = [[user for user in layer.exit.users if user not in inside[at]] for at, layer in enumerate(stack.layers)]
    current, used, found, kept = stack.layers[0].entry, -1, list[Layer](), list[Cache]()
    entries = [layer.entry for layer in stack.layers]  # as the layers read them now
    for unique in order:
        layer, cache = stack.layers[unique], own[unique]
        if unique == used + 1:
            if unique:
                _lead(behind[unique - 1], stack.layers[unique - 1].exit, current)
                entries[unique] = current
            current, used = layer.exit, unique
            found.append(layer)
        else:
            layer, cache = _copied(rewriter, layer, cache, entries[unique], current)
            current = layer.exit
            found.append(layer)
        kept += [cache] if cache is not None else []
    _lead(behind[-1], stack.layers[-1].exit, current)
    if kept:
        arrange_caches(rewriter, kept)
    rewriter.changed = True
    return found


def _lead(readers: Sequence[fx.Node], old: fx.Node, new: fx.Node) -> None:
    for reader in readers:
        if old is not new:
            reader.replace_input_with(old, new)


def _copied(
    rewriter: Rewriter, layer: Layer, cache: Cache | None, old: fx.Node, entry: fx.Node
) -> tuple[Layer, Cache | None]:
    """The layer, which reads ``old``, once more behind ``entry``, with a cache of its own."""
    graph = rewriter.program.graph
    copies: dict[fx.Node, fx.Node] = {layer.entry: entry, old: entry}
    if cache is not None:
        copies[cache.keys], copies[cache.values] = add_cache(rewriter, cache)
    order = {node: place for place, node in enumerate(rewriter.program.nodes)}
    last = entry
    for node in sorted(layer.nodes, key=order.__getitem__):
        with graph.inserting_after(last):
            copy = graph.node_copy(node, lambda item: copies.get(item, item))
        copy.meta = {key: node.meta[key] for key in (PATH, SOURCE, TAGS) if key in node.meta}
        copy.meta[TAGS] = tags_of(node)
        rewriter.program.symbols.infer(copy, rewriter.program.tensor)
        copies[node] = last = copy
    segments = tuple(_mapped(segment, copies) for segment in layer.segments)
    if cache is not None:
        cache = Cache(*(copies[each] for each in (cache.keys, cache.values, cache.new_keys, cache.new_values)))
    return Layer(segments), cache


def _mapped(segment: Any, copies: Mapping[fx.Node, fx.Node]) -> Any:
    def of(nodes: Sequence[fx.Node]) -> tuple[fx.Node, ...]:
        return tuple(copies.get(node, node) for node in nodes)

    return type(segment)(
        copies[segment.entry],
        copies[segment.exit],
        of(segment.nodes),
        segment.weights,
        of(segment.inputs),
        (),
        segment.form,
    )
