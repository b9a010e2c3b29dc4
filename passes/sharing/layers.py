"""The pass that lets layers share their weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from graphwright.ir.errors import InputError
from graphwright.ir.program import Program
from graphwright.ir.repetitions import Sharing, tag_repetitions
from graphwright.ir.rewriter import Rewriter
from graphwright.ir.stacks import Stack
from graphwright.passes.base import Pass
from graphwright.passes.calibration import CalibrationData
from graphwright.passes.contract import Contract, Retrain
from graphwright.passes.sharing.choosing import check_alike, check_untouched, choose_stack
from graphwright.passes.sharing.initial import STARTS, initial_weights
from graphwright.passes.sharing.orders import check_order, layer_order
from graphwright.passes.sharing.parts import check_part, weights_of_part

# Passes after which weights are no longer weights -> why sharing must come first.
TOO_LATE: Mapping[str, str] = {
    name: f"{what}; share layers first, and each shared weight is {done} once"
    for names, what, done in (
        (("quantize-linears", "convert-fake-quantize"), "codes of different layers cannot be made one", "quantised"),
        (("insert-fake-quantize",), "ranges of different layers cannot be made one", "quantised"),
        (("insert-adapters",), "what was adapted would no longer be there", "kept once under its adapters,"),
        (("split-outlier-columns", "split-outlier-weights"), "layers were split at different places", "split"),
    )
    for name in names
}


@dataclass(frozen=True, kw_only=True)
class ShareLayers(Pass):
    """Let N layers use the weights of N_d of them, each G times (Hooper et al., SPEED; Takase and Kiyono 2021).

    ::

        %a = aten.linear(%x, %layers_0_weight)
        %b = aten.linear(%a, %layers_1_weight)
        %c = aten.linear(%b, %layers_2_weight)
        %d = aten.linear(%c, %layers_3_weight)
        ->                                                  groups=2, order="cycle"
        %a = aten.linear(%x, %layers_0_weight)
        %b = aten.linear(%a, %layers_1_weight)
        %c = aten.linear(%b, %layers_0_weight)
        %d = aten.linear(%c, %layers_1_weight)

    Layers are found by what they compute, see :func:`graphwright.ir.stacks.find_stacks`. The calls stay, and so does a
    decoding step's cache for each of them; every shared weight is one tensor, under the name that it has in the first
    layer that uses it, and the other layers' names are tied to it. Numbers in the graph, such as windows of attention,
    stay each layer's own. ``Program.records["sharing"]`` says how layers share, and each node of the layers has the tag
    of its repetition (:mod:`graphwright.ir.repetitions`).

    The function changes until the model is trained. It does not fire where the weights are shared so already. It is an
    error if no block is repeated, the layers do not divide, differ in shape, are quantised or have adapters.

    Attributes:
        groups: distinct layers, N_d.
        repeats: how often each is used, G. One of the two says the other; by default layers are used twice.
        order: ``"cycle"`` (0 1 0 1), ``"sequence"`` (0 0 1 1) or ``"cycle-reversed"`` (0 1 1 0).
        start: what a shared weight is at first: ``"first"``, ``"every-kth"``, ``"mean"`` or ``"least-squares"``, see
            :func:`graphwright.passes.sharing.initial.initial_weights`.
        part: ``"block"``, or only the weights of ``"attention"`` or ``"feed-forward"``.
        calibration: typical inputs, for least squares.
    """

    name: ClassVar[str] = "share-layers"
    contract: ClassVar[Contract] = Retrain()
    not_after: ClassVar[Mapping[str, str]] = TOO_LATE
    respects: ClassVar[frozenset[str]] = frozenset()

    groups: int | None = None
    repeats: int | None = None
    order: str = "cycle"
    start: str = "first"
    part: str = "block"
    calibration: Iterable[Any] | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("groups", "repeats"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise InputError(f"must be a number of at least 1, not {value!r}", where=f"{self.name}: {name}")
        check_order(self.order, self.name)
        check_part(self.part, self.name)
        if self.start not in STARTS:
            raise InputError(
                f"there is no start {self.start!r}", where=f"{self.name}: start", hint=f"starts: {', '.join(STARTS)}"
            )
        if self.calibration is not None:
            object.__setattr__(self, "calibration", CalibrationData.of(self.calibration))

    def run(self, program: Program) -> bool:
        """Share; all or nothing.

        Raises:
            InputError: no block is repeated, layers do not divide or differ, are quantised or adapted, or a weight is
                read elsewhere too.
        """
        stack = choose_stack(program, self.selected(program), self.name)
        check_untouched(program, stack, self.name)
        sharing = self._sharing(stack)
        order = layer_order(sharing.groups, sharing.repeats, sharing.order)
        places = weights_of_part(stack.layers[0], self.part)
        if not places:
            raise InputError(f"the layers have no weights of {self.part}", where=self.name, context=[str(stack)])
        check_alike(program, stack, self.name, places)
        data = self.calibration
        assert data is None or isinstance(data, CalibrationData)
        before = Sharing.find(program)
        with program.edit() as rewriter:
            if not all(_is_shared(stack, order, place) for place in places):
                share(rewriter, stack, order, initial_weights(program, stack, order, places, self.start, data))
            if before != sharing:
                tag_repetitions(stack, sharing.groups)
                sharing.record(program)
            program.notes.update({"layers": len(stack.layers), "groups": sharing.groups, "repeats": sharing.repeats})
            return rewriter.changed

    def _sharing(self, stack: Stack) -> Sharing:
        layers, groups, repeats = len(stack.layers), self.groups, self.repeats
        if groups is None and repeats is None:
            repeats = 2
        if groups is None:
            assert repeats is not None
            groups = layers // repeats
        if repeats is None:
            repeats = layers // groups
        if groups * repeats != layers:
            fit = [number for number in range(1, layers + 1) if layers % number == 0]
            raise InputError(
                f"{layers} layers are not {groups or self.groups} repeated {repeats} times",
                where=self.name,
                hint=f"groups of {', '.join(map(str, fit))} divide them",
                context=[str(stack)],
            )
        return Sharing(groups, repeats, self.order, self.part)


def _is_shared(stack: Stack, order: tuple[int, ...], place: int) -> bool:
    first: dict[int, Any] = {}
    return all(
        first.setdefault(unique, layer.weights[place]) is layer.weights[place]
        for unique, layer in zip(order, stack.layers, strict=True)
    )


def share(
    rewriter: Rewriter, stack: Stack, order: tuple[int, ...], values: Mapping[tuple[int, int], torch.Tensor]
) -> None:
    """Let layers read the weights of the first layer that uses the same distinct one, with these values.

    Raises:
        InputError: a weight is read outside of its layer too.
    """
    program = rewriter.program
    shared = {layer: set(stack.layers[layer].nodes) for layer in range(len(stack.layers))}
    owner: dict[tuple[int, int], Any] = {}
    everywhere = set().union(*shared.values())
    for (unique, place), tensor in values.items():
        for at, layer in enumerate(stack.layers):
            if order[at] != unique:
                continue
            node = layer.weights[place]
            kept = owner.setdefault((unique, place), node)
            outside = [user for user in node.users if user not in everywhere]
            if outside:
                raise InputError(
                    f"the weight {node.target} is read outside of the layers too, by %{outside[0].name}",
                    where="share-layers",
                    hint="it is tied; leave these layers out with where=",
                )
            if kept is node:
                if program.tensor(node) is not tensor:
                    rewriter.rebind(node, tensor.detach().clone())
                continue
            if node._erased or node.target == kept.target:  # read twice in its layer, or shared already
                continue
            inside = [user for user in node.users if user in shared[at]]
            rewriter.redirect(node, kept, besides=[user for user in node.users if user not in inside], equivalent=False)
            if not node.users:
                _tie(program, str(node.target), str(kept.target))
                rewriter.erase(node)


def _tie(program: Program, name: str, kept: str) -> None:
    """Let a name, and those tied to it, stand for another weight."""
    for alias, target in list(program.aliases.items()):
        if target == name:
            program.aliases[alias] = kept
    program.aliases[name] = kept
