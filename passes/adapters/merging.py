"""Adapters that become part of the weights, or go."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from graphwright.ir.errors import InputError
from graphwright.ir.program import Program
from graphwright.ir.rewriter import Rewriter
from graphwright.passes.adapters.inserted import (
    FOLDED,
    GATED,
    MERGED,
    Inserted,
    adapter_of,
    adapters_of,
    base_of,
    checked_names,
    forget,
)
from graphwright.passes.adapters.merged import note_merged
from graphwright.passes.adapters.places import Place, Rounded, called_anew, check_readers, place_of, write_merged
from graphwright.passes.adapters.virtual import shorten
from graphwright.passes.base import Pass
from graphwright.passes.contract import Approximate, Contract, Exact, Retrain
from graphwright.passes.quantization.loss import report_entries

_REMEDY = (
    "merge before quantising, keep the adapter beside the packed weight, or round it again with "
    "MergeAdapters(requantize=True), which measures what is lost"
)
# What storing a weight anew may make of an output, in epsilons of its dtype; as for exact passes.
_STORED = 32.0


@dataclass(frozen=True, kw_only=True)
class MergeAdapters(Pass):
    """Make adapters part of the weights they lie beside.

    ::

        %y = aten.linear(%x, %weight, %bias)
        %hidden = aten.linear(%x, %lora_A)
        %branch = aten.linear(%hidden, %lora_B)
        %adapted = aten.add.Tensor(%y, %branch)
        ->
        %adapted = aten.linear(%x, %weight, %bias)      the weight's values are W + B A, computed in float64

    The weight keeps its name, dtype and layout; the base model's own tensor is not written into. The program remembers
    what was merged, so :class:`UnmergeAdapters` can take it out again, bit for bit. Linears that share one stacked
    weight (:class:`FuseQKV`) take adapters into its rows.

    It does not fire on kinds that cannot be merged, on weights that something without the adapter reads too, and on
    packed or pruned weights unless told: all of these are errors, as a program half merged serves nobody.

    Attributes:
        adapters: names of those to be merged, in the order in which they were put in; ``None`` for all.
        requantize: merge into packed weights too: they are unpacked, and rounded again in the same format. The function
            then changes by that rounding, which the report measures: of each weight, and as a fraction of what the
            adapter changed in it, which is 1 where rounding loses as much as the adapter brings.
        keep_mask: merge into pruned weights too, where they are not 0: zeros stay zeros, and what the adapter brings
            there is dropped. The report has the fraction of its change that was, of each weight.
        keep: keep the base's tensors and the adapter's in memory, for :class:`UnmergeAdapters`. It costs nothing while
            the model is there that the base is shared with. Otherwise it needs them from disk.
    """

    name: ClassVar[str] = "merge-adapters"
    contract: ClassVar[Contract] = Exact(stored=True)
    respects: ClassVar[frozenset[str]] = frozenset()
    judges_history: ClassVar[bool] = True

    adapters: tuple[str, ...] | None = None
    requantize: bool = False
    keep_mask: bool = False
    keep: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "adapters", checked_names(self.name, self.adapters))

    def effective_contract(self) -> Contract:
        """Exact, but for packed weights."""
        return Approximate() if self.requantize or self.keep_mask else self.contract

    def conflicts(self) -> Mapping[str, str]:
        """Packed weights are only merged into when that is asked for."""
        reason = f"the weights are packed by then, and merging would round the adapter away: {_REMEDY}"
        return {} if self.requantize else {"quantize-linears": reason}

    def run(self, program: Program) -> bool:
        """Merge them; all or nothing.

        Raises:
            InputError: there is no such adapter, it has been merged already, its kind cannot be merged, a weight is
                packed, or another adapter lies between it and the weight.
        """
        chosen = _chosen(program, self.adapters)
        losses: dict[str, Rounded] = {}
        dropped: dict[str, float] | None = {} if self.keep_mask else None
        with program.edit() as rewriter:
            for adapter in chosen:
                before, known = program.tensors(), len(losses)
                _merge(rewriter, adapter, losses if self.requantize else None, dropped)
                note_merged(program, adapter, before, rounded=len(losses) > known, keep=self.keep)
                forget(program, adapter.name)
            program.notes["merged"] = [adapter.name for adapter in chosen]
        if losses:
            program.notes.update(_noted(losses))
        if dropped:
            program.notes["dropped_of_adapter"] = dropped
        return bool(chosen)


@dataclass(frozen=True, kw_only=True)
class RemoveAdapters(Pass):
    """Take adapters out again; what is left is the base, bit for bit.

    Attributes:
        adapters: names of those to go; ``None`` for all.
    """

    name: ClassVar[str] = "remove-adapters"
    contract: ClassVar[Contract] = Retrain()
    respects: ClassVar[frozenset[str]] = frozenset()

    adapters: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "adapters", checked_names(self.name, self.adapters))

    def run(self, program: Program) -> bool:
        """Take them out.

        Raises:
            InputError: there is no such adapter.
        """
        chosen = _chosen(program, self.adapters)
        with program.edit() as rewriter:
            for adapter in chosen:
                for site in adapter.sites.values():
                    for exit_ in site.exits:
                        rewriter.replace(exit_, base_of(exit_, adapter.name), equivalent=False, retyped=True)
                shorten(rewriter, adapter.name)
                forget(program, adapter.name)
        return bool(chosen)


def _chosen(program: Program, names: tuple[str, ...] | None) -> list[Inserted]:
    """The adapters of these names, in the order in which they were put in; all of them by default.

    Raises:
        InputError: there is none of a name, or it has been merged or folded; without names: all there were have been.
    """
    present = adapters_of(program)
    if names is None:
        gone = (*program.records.get(MERGED, {}), *program.records.get(FOLDED, {}))
        for name in gone if not present else ():
            adapter_of(program, name)
        return list(present.values())
    wanted = {adapter_of(program, name).name for name in names}
    return [adapter for name, adapter in present.items() if name in wanted]


def _merge(
    rewriter: Rewriter, adapter: Inserted, losses: dict[str, Rounded] | None, dropped: dict[str, float] | None
) -> None:
    """Merge one adapter; what rounding loses of packed weights is put into ``losses``, and what masks drop of its
    change into ``dropped``; ``None`` to refuse such weights."""
    program = rewriter.program
    # by the weights that are done: the bias, which the layer may not have had
    done: dict[tuple[fx.Node, tuple[int, int] | None], fx.Node | None] = {}
    approximate = losses is not None or dropped is not None
    limits = program.notes.setdefault("local_limits", {}) if approximate else {}
    for site in adapter.sites.values():
        if adapter.name in program.records.get(GATED, ()):
            raise InputError(
                f"adapter {adapter.name!r} is switched as the program runs, so no weight can take it in",
                where=site.path,
                hint="merge it before GateAdapters, or into the program from before",
            )
        if site.kind.unmergeable is not None:
            raise InputError(
                f"adapter {adapter.name!r} cannot be merged: {site.kind.unmergeable}",
                where=site.path,
                hint="keep it beside the weights, where it also runs",
            )
        places = {exit_: place_of(program, adapter, site, exit_) for exit_ in site.exits}
        for exits in _by_layer(places):
            # Merging at one layer may have replaced nodes of the next, where both are rows of one weight.
            place = place_of(program, adapter, site, exits[0])
            if place.packed is not None and losses is None:
                raise InputError(
                    "the weight is packed, and merging would round the adapter away", where=site.path, hint=_REMEDY
                )
            if place.is_masked and dropped is None:
                raise InputError(
                    "the weight was pruned, and merging would fill its zeros",
                    where=site.path,
                    hint="keep the adapter beside it, or drop what it brings there: MergeAdapters(keep_mask=True)",
                )
            key = place.stored, place.rows
            if key not in done:  # a module that is called several times
                check_readers(program, place, places.values(), adapter.name)
                done[key], loss, lost = write_merged(rewriter, place, site)
                if lost is not None and dropped is not None:
                    dropped[str(place.stored.target)] = lost
                if loss is not None and losses is not None:
                    losses[str(place.stored.target)] = loss
            fed = next((exit_ for exit_ in exits if exit_ is place.site.x), None)
            x = place.site.x if fed is None else base_of(fed, adapter.name)
            merged = called_anew(rewriter, place, x, done[key])
            rewriter.replace(next((exit_ for exit_ in exits if exit_ is not fed), place.site.node), merged)
            epsilon = torch.finfo(place.site.dtype).eps
            if not place.is_masked:
                limits[merged.name] = place.packed.local_limit if place.packed is not None else _STORED * epsilon


def _noted(losses: Mapping[str, Rounded]) -> dict[str, Any]:
    found = report_entries({name: rounded.loss for name, rounded in losses.items()})
    for name, rounded in losses.items():
        found["weights"][name]["of_adapter"] = rounded.of_adapter
    return found


def _by_layer(places: Mapping[fx.Node, Place]) -> list[list[fx.Node]]:
    """The exits of every layer: what it reads, what it gives, or both."""
    layers: dict[tuple[fx.Node, tuple[int, int] | None], list[fx.Node]] = {}
    for exit_, place in places.items():
        layers.setdefault((place.site.node, place.rows), []).append(exit_)
    return list(layers.values())
