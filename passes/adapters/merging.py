"""Adapters that become part of the weights, or go."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx, nn

from graphwright.ir.arguments import arguments_of
from graphwright.ir.errors import InputError
from graphwright.ir.program import Program
from graphwright.ir.provenance import tags_of
from graphwright.ir.rewriter import Rewriter
from graphwright.ir.types import VAL
from graphwright.passes.adapters.base import Dense
from graphwright.passes.adapters.builder import exit_tag, tag_of
from graphwright.passes.adapters.inserted import (
    Inserted,
    InsertedSite,
    adapter_of,
    adapters_of,
    base_of,
    fed_by,
    forget,
)
from graphwright.passes.adapters.sites import ADAPTER, Site
from graphwright.passes.base import Pass
from graphwright.passes.contract import Contract, Exact, Retrain


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

    The weight keeps its name, dtype and layout; the base model's own tensor is not written into.

    Attributes:
        adapters: names of those to be merged, in the order in which they were put in; ``None`` for all.
    """

    name: ClassVar[str] = "merge-adapters"
    contract: ClassVar[Contract] = Exact(stored=True)
    respects: ClassVar[frozenset[str]] = frozenset()

    adapters: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.adapters is not None:
            object.__setattr__(self, "adapters", _names(self.name, self.adapters))

    def run(self, program: Program) -> bool:
        """Merge them; all or nothing.

        Raises:
            InputError: there is no such adapter (it may have been merged already), its kind cannot be merged, a weight
                is packed, or another adapter lies between it and the weight.
        """
        chosen = _chosen(program, self.adapters)
        with program.edit() as rewriter:
            for adapter in chosen:
                _merge(rewriter, adapter)
                forget(program, adapter.name)
            program.notes["merged"] = [adapter.name for adapter in chosen]
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
        if self.adapters is not None:
            object.__setattr__(self, "adapters", _names(self.name, self.adapters))

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
                forget(program, adapter.name)
        return bool(chosen)


def _names(owner: str, names: object) -> tuple[str, ...]:
    if isinstance(names, str) or not isinstance(names, tuple | list) or not all(isinstance(n, str) for n in names):
        raise InputError(f"must be names of adapters, not {names!r}", where=f"{owner}: adapters")
    return tuple(names)


def _chosen(program: Program, names: tuple[str, ...] | None) -> list[Inserted]:
    if names is None:
        return list(adapters_of(program).values())
    return [adapter_of(program, name) for name in names]


def _merge(rewriter: Rewriter, adapter: Inserted) -> None:
    program = rewriter.program
    biases: dict[fx.Node, fx.Node | None] = {}  # by the weights that are done: the bias, which they may not have had
    for site in adapter.sites.values():
        if site.kind.unmergeable is not None:
            raise InputError(
                f"adapter {adapter.name!r} cannot be merged: {site.kind.unmergeable}",
                where=site.path,
                hint="keep it beside the weights, where it also runs",
            )
        places = {exit_: _place(program, adapter, site, exit_) for exit_ in site.exits}
        for node in dict.fromkeys(place.node for place in places.values()):
            exits = [exit_ for exit_, place in places.items() if place.node is node]
            place = places[exits[0]]
            assert place.weight is not None
            if place.weight not in biases:  # a module that is called several times
                _check_readers(program, place, places.values(), adapter)
                biases[place.weight] = _write(rewriter, place, site)
            fed = next((exit_ for exit_ in exits if exit_ is place.x), None)
            given = arguments_of(node)
            if place.bias is None and biases[place.weight] is not None:
                given["bias"] = biases[place.weight]
            if fed is not None:
                given[place.input_name] = base_of(fed, adapter.name)
            # A node of its own, because the bare one's value, by whose name it is known, is another.
            merged = rewriter.call(node.target, like=node, **given)
            rewriter.replace(next((exit_ for exit_ in exits if exit_ is not fed), node), merged)


def _place(program: Program, adapter: Inserted, site: InsertedSite, exit_: fx.Node) -> Site:
    """The layer that an adapter lies beside, or before."""
    fed = fed_by(exit_, adapter.name)
    base = base_of(exit_, adapter.name) if fed is None else fed
    if ADAPTER in tags_of(base):
        raise InputError(
            f"adapter {adapter.name!r} lies on another one",
            where=site.path,
            hint="merge them in the order in which they were put in, or all at once",
        )
    place = site.kind.site_at(program, base)
    if not isinstance(place, Site) or (fed is not None and place.x is not exit_):
        raise InputError(
            f"the layer cannot take an adapter in: {place or f'%{base.name} is none that it lies beside'}",
            where=site.path,
        )
    if place.weight is None:
        raise InputError(
            "the weight is packed, and merging would round the adapter away",
            where=site.path,
            hint="merge before quantising, or keep the adapter beside the packed weight",
        )
    inputs = {base_of(place.x, adapter.name), place.x, place.node}
    other = next((each for each in _reads(exit_, adapter.name, place) if each not in inputs), None)
    if other is not None:
        raise InputError(
            f"adapter {adapter.name!r} reads %{other.name}, but its layer reads %{place.x.name}, which another adapter "
            "gives",
            where=site.path,
            hint="merge first the one that was put in last, or keep them",
        )
    return place


def _reads(exit_: fx.Node, name: str, place: Site) -> Iterator[fx.Node]:
    """What an adapter's nodes read that is neither theirs nor a weight."""
    tag, stack, seen = tag_of(name), [exit_], set[fx.Node]()
    while stack:
        node = stack.pop()
        for source in node.all_input_nodes:
            if source in seen or source.op == "get_attr" or not isinstance(source.meta[VAL], torch.Tensor):
                continue
            seen.add(source)
            if tag in tags_of(source) and source is not place.x and exit_tag(name) not in tags_of(source):
                stack.append(source)
            else:
                yield source


def _check_readers(program: Program, place: Site, places: Iterable[Site], adapter: Inserted) -> None:
    """Refuse a weight that something without this adapter reads too."""
    assert place.weight is not None
    adapted = {each.node for each in places}
    own = tag_of(adapter.name)  # such as DoRA's norm of the weight, which goes
    nodes = [node for node in program.nodes if node.op == "get_attr" and node.target == place.weight.target]
    others = [user for node in nodes for user in node.users if user not in adapted and own not in tags_of(user)]
    if others:
        raise InputError(
            f"the weight is also read by %{others[0].name}, which has no adapter",
            where=place.path,
            hint="keep the adapter beside the weight",
        )


def _write(rewriter: Rewriter, place: Site, site: InsertedSite) -> fx.Node | None:
    """Give the weight and bias the merged values; returns the bias, a new one where there was none before."""
    program = rewriter.program
    assert place.weight is not None
    stored = program.tensor(place.weight).detach()
    weight = (stored.t() if place.transposed else stored).double()
    bias = program.tensor(place.bias).detach().double() if place.bias is not None else None
    factors = {key: program.tensor(name).detach().double() for key, name in site.tensors.items()}
    merged = site.kind.merged(place, Dense(weight, bias), factors)
    new = merged.weight.t() if place.transposed else merged.weight
    rewriter.rebind(place.weight, new.to(stored.dtype).contiguous())
    if merged.bias is None or (bias is not None and torch.equal(merged.bias, bias)):
        return place.bias
    if place.bias is not None:
        rewriter.rebind(place.bias, merged.bias.to(program.tensor(place.bias).dtype))
        return place.bias
    if "bias" not in arguments_of(place.node):
        raise InputError(
            f"%{place.node.name} is a product that takes no bias, and the adapter has one",
            where=place.path,
            hint="run Cleanup first, which makes it a linear",
        )
    new_bias: torch.Tensor = merged.bias.to(stored.dtype)
    if isinstance(program.tensor(place.weight), nn.Parameter):
        new_bias = nn.Parameter(new_bias, program.tensor(place.weight).requires_grad)
    return rewriter.weight(f"{place.path}.bias".lstrip("."), new_bias, like=place.node)
