"""The passes that take layers out of a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import fx

from graphwright.ir.decoder import DecoderLayout
from graphwright.ir.decoder_caches import Cache, arrange_caches, cache_within, caches_of
from graphwright.ir.errors import InputError
from graphwright.ir.program import Program
from graphwright.ir.repetitions import RECORD, Sharing
from graphwright.ir.stacks import Layer, Segment, Stack
from graphwright.passes.base import Pass
from graphwright.passes.calibration import CalibrationData
from graphwright.passes.contract import Contract, Retrain
from graphwright.passes.sharing.choosing import choose_stack
from graphwright.passes.sharing.deepening import check_contained
from graphwright.passes.sharing.parts import check_part, has_attention, is_joint
from graphwright.passes.sharing.removal import next_token_loss
from graphwright.passes.sharing.similarity import similarities

_MEASURES = ("similarity", "loss")

_NOT_AFTER: Mapping[str, str] = {
    "hoist-row-selection": "its last layer is computed for the wanted rows only; take layers out first",
    "classify-repetitions": "the outputs that it added would be of other repetitions; classify a clone afterwards",
    "insert-adapters": "adapters are written down by their places; take layers out first",
}


@dataclass(frozen=True, kw_only=True)
class DropBlocks(Pass):
    """Take out the layers, or the attention or feed-forward blocks, that change least what goes through them.

    ::

        %mixed = graphwright.cached_attention(...)          with its norm, linears and caches
        %a = aten.add.Tensor(%x, %mixed_out)
        %b = aten.add.Tensor(%a, %f)
        ->                                                  part="attention"
        %b = aten.add.Tensor(%x, %f)

    Importance is measured on calibration data: once, as the cosine between what enters and what leaves (He et al. 2024,
    LLM-Drop); or, for language models, by taking out one after the other that whose absence costs the least loss (Song
    et al. 2024, SLEB). Or ``layers`` says which. A decoding step loses the caches of what attends no more, and those
    left are numbered anew. The function changes; training makes up for some of it.

    It does not fire with ``count=0``. It is an error if a part stands beside another one (GPT-NeoX, Phi, Falcon: drop
    the block), everything would go, or layers share weights and not all of them would any more.

    Attributes:
        count: how many are taken out; at least one is left.
        part: ``"block"``, ``"attention"`` or ``"feed-forward"``.
        layers: numbers of the layers whose part is taken out, instead of the least important.
        measure: ``"similarity"`` or ``"loss"``, which runs the model for every candidate.
        calibration: typical inputs; needed unless ``layers`` are given.
    """

    name: ClassVar[str] = "drop-blocks"
    contract: ClassVar[Contract] = Retrain()
    respects: ClassVar[frozenset[str]] = frozenset()
    not_after: ClassVar[Mapping[str, str]] = _NOT_AFTER

    count: int = 1
    part: str = "block"
    layers: tuple[int, ...] | None = None
    measure: str = "similarity"
    calibration: Iterable[Any] | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.count, bool) or not isinstance(self.count, int) or self.count < 0:
            raise InputError(f"must be a number of blocks, not {self.count!r}", where=f"{self.name}: count")
        check_part(self.part, self.name)
        if self.measure not in _MEASURES:
            raise InputError(
                f"there is no measure {self.measure!r}",
                where=f"{self.name}: measure",
                hint=f"measures: {', '.join(_MEASURES)}",
            )
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(self.layers))
        if self.calibration is not None:
            object.__setattr__(self, "calibration", CalibrationData.of(self.calibration))

    def run(self, program: Program) -> bool:
        """Take them out; all or nothing.

        Raises:
            InputError: no block is repeated, there is no calibration data, the part cannot be taken out, or nothing
                would be left.
        """
        if self.count == 0 and self.layers is None:
            return False
        stack = choose_stack(program, self.selected(program), self.name)
        places = [_stretch(layer, self.part, self.name, number) for number, layer in enumerate(stack.layers)]
        chosen = self._chosen(program, stack, places)
        drop(program, stack, {number: places[number] for number in chosen}, self.name)
        program.notes.update({"dropped": chosen, "part": self.part})
        return True

    def _chosen(self, program: Program, stack: Stack, places: Sequence[tuple[fx.Node, fx.Node]]) -> list[int]:
        total = len(stack.layers)
        if self.layers is not None:
            wrong = [number for number in self.layers if not 0 <= number < total]
            if wrong:
                raise InputError(f"there is no layer {wrong[0]}", where=f"{self.name}: layers", context=[str(stack)])
            chosen = sorted(set(self.layers))
        else:
            if self.calibration is None:
                raise InputError(
                    "needs calibration data to tell which change least",
                    where=f"{self.name}: calibration",
                    hint="give calibration=[batch, ...], or layers=(...)",
                )
            data = self.calibration
            assert isinstance(data, CalibrationData)
            if self.count < total:
                chosen = (
                    self._by_loss(program, data)
                    if self.measure == "loss"
                    else _most_alike(program, places, data, self.count)
                )
            else:
                chosen = list(range(total))
        if (len(chosen) >= total and self.part == "block") or self.count > total:
            raise InputError(
                f"{len(chosen)} of {total} layers cannot go: one must stay", where=self.name, context=[str(stack)]
            )
        return chosen

    def _by_loss(self, program: Program, data: CalibrationData) -> list[int]:
        gone: list[int] = []
        steps: list[dict[str, float]] = []
        for _ in range(self.count):
            losses: dict[int, float] = {}
            for number in range(len(choose_stack(program, self.selected(program), self.name).layers)):
                if number in gone:
                    continue
                trial = program.clone()
                stack = choose_stack(trial, self.selected(trial), self.name)
                without = [*gone, number]
                places = {at: _stretch(stack.layers[at], self.part, self.name, at) for at in without}
                drop(trial, stack, places, self.name)
                trial.body.recompile()
                losses[number] = next_token_loss(trial, data)
            gone.append(min(losses, key=lambda each: (losses[each], -each)))
            steps.append({str(number): round(loss, 6) for number, loss in losses.items()})
        program.notes["loss_without"] = steps
        return sorted(gone)


def _most_alike(
    program: Program, places: Sequence[tuple[fx.Node, fx.Node]], data: CalibrationData, count: int
) -> list[int]:
    alike = similarities(program, places, data)
    program.notes["similarity"] = [round(each, 6) for each in alike]
    # Of equals the later one: what is deep has fewer layers to disturb.
    ranked = sorted(range(len(alike)), key=lambda number: (-alike[number], -number))
    return sorted(ranked[:count])


@dataclass(frozen=True, kw_only=True)
class TruncateDepth(Pass):
    """Keep the first layers, or repetitions, with what follows the last: the sub-model of less depth.

    ::

        %a, %b, %c                                          what three layers give
        %logits = aten.linear(graphwright.rms_norm(%c, %norm), %head)
        ->                                                  layers=2
        %logits = aten.linear(graphwright.rms_norm(%b, %norm), %head)

    A model that was trained with :class:`ClassifyRepetitions` has such a sub-model after every repetition. A decoding
    step loses the caches of the other layers. It does not fire where there are not more. One of the two options is
    needed to change anything.

    Attributes:
        layers: how many are kept.
        repetitions: of a program whose layers share weights, how many are kept.
    """

    name: ClassVar[str] = "truncate-depth"
    contract: ClassVar[Contract] = Retrain()
    respects: ClassVar[frozenset[str]] = frozenset()
    not_after: ClassVar[Mapping[str, str]] = _NOT_AFTER

    layers: int | None = None
    repetitions: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("layers", "repetitions"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise InputError(f"must be a number of at least 1, not {value!r}", where=f"{self.name}: {name}")
        if self.layers is not None and self.repetitions is not None:
            raise InputError("give layers or repetitions, not both", where=self.name)

    def run(self, program: Program) -> bool:
        """Keep the first; all or nothing.

        Raises:
            InputError: no block is repeated, or repetitions are asked for and there are none.
        """
        if self.layers is None and self.repetitions is None:
            return False
        sharing = Sharing.find(program)
        if self.repetitions is not None and sharing is None:
            raise InputError(
                "the layers share nothing, so there are no repetitions", where=self.name, hint="say how many layers="
            )
        stack = choose_stack(program, self.selected(program), self.name)
        kept = self.layers if self.repetitions is None else self.repetitions * (sharing.groups if sharing else 1)
        assert kept is not None
        if kept >= len(stack.layers):
            return False
        rest = range(kept, len(stack.layers))
        drop(program, stack, {at: (stack.layers[at].entry, stack.layers[at].exit) for at in rest}, self.name)
        program.notes["kept"] = kept
        return True


def drop(program: Program, stack: Stack, places: Mapping[int, tuple[fx.Node, fx.Node]], where: str) -> None:
    """Lead around stretches, and remove them with the caches that they alone read.

    Args:
        program: whose layers they are.
        stack: the layers.
        places: entry and exit by number of the layer.
        where: the pass, for messages.

    Raises:
        InputError: something else reads what is taken out, or the types of entry and exit differ.
    """
    check_contained(stack, where)
    layout = DecoderLayout.find(program)
    caches = caches_of(layout, program.inputs, program.results) if layout is not None else []
    gone: list[Cache] = []
    for at, place in places.items():
        cache = cache_within(stack.layers[at], caches)
        if cache is not None and _attends(stack.layers[at], place):
            gone.append(cache)
    with program.edit() as rewriter:
        _adjust_record(program, stack, places)
        # What these caches become is an output no more; those of the others keep their places until all is removed.
        lost = {node for cache in gone for node in (cache.new_keys, cache.new_values)}
        program.output.args = (tuple(item for item in program.results if item not in lost),)
        for at in places:
            for node in reversed(stack.layers[at].aside):
                if not node.users:
                    rewriter.erase(node)
        leading: dict[fx.Node, fx.Node] = {}
        for _, (entry, exit_) in sorted(places.items()):
            leading[exit_] = leading.get(entry, entry)
            rewriter.replace(exit_, leading[exit_], equivalent=False)
        if gone:
            arrange_caches(rewriter, [cache for cache in caches if cache not in gone])
        rewriter.changed = True


def _attends(layer: Layer, place: tuple[fx.Node, fx.Node]) -> bool:
    """Whether a stretch of a layer has its attention."""
    inside = False
    for segment in layer.segments:
        inside = inside or segment.entry is place[0]
        if inside and has_attention(segment):
            return True
        if segment.exit is place[1]:
            break
    return False


def _stretch(layer: Layer, part: str, where: str, number: int) -> tuple[fx.Node, fx.Node]:
    """Entry and exit of a part of a layer.

    Raises:
        InputError: it stands beside another part, or the layer has none.
    """
    if part == "block":
        return layer.entry, layer.exit
    fit: list[Segment] = []
    for segment in layer.segments:
        if is_joint(segment):
            raise InputError(
                "attention and feed-forward stand beside each other and are added together",
                where=f"{where}: layer {number}, %{segment.exit.name}",
                hint="part='block' takes the whole layer out",
            )
        attends = has_attention(segment)
        branches = sum(segment.entry in node.all_input_nodes for node in segment.nodes) > 1
        if attends == (part == "attention") and branches and (attends or segment.weights):
            fit.append(segment)
    if len(fit) != 1:
        raise InputError(
            f"has {len(fit)} stretches of {part} with a way around them, not one",
            where=f"{where}: layer {number} {layer.path}".rstrip(),
            hint="part='block' takes the whole layer out",
        )
    return fit[0].entry, fit[0].exit


def _adjust_record(program: Program, stack: Stack, places: Mapping[int, tuple[fx.Node, fx.Node]]) -> None:
    """What the records say of repetitions once layers are gone: fewer, or nothing where some are incomplete."""
    sharing = Sharing.find(program)
    if sharing is None:
        return
    whole = {
        at
        for at, (entry, exit_) in places.items()
        if entry is stack.layers[at].entry and exit_ is stack.layers[at].exit
    }
    left = len(stack.layers) - len(whole)
    is_prefix = whole == set(range(left, len(stack.layers))) == set(places)
    if is_prefix and left % sharing.groups == 0 and sharing.order == "cycle":
        Sharing(sharing.groups, left // sharing.groups, sharing.order, sharing.part).record(program)
    else:
        program.records.pop(RECORD)
