"""Which adapters a program has: what insertion wrote down, with the nodes and tensors that are theirs now."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphwright.ir.errors import InputError
from graphwright.ir.program import Program
from graphwright.ir.provenance import path_of, tags_of
from graphwright.passes.adapters.base import AdapterKind
from graphwright.passes.adapters.builder import exit_tag, fed_tag, tag_of
from graphwright.passes.adapters.kinds import kind_of

# Where a program's records have the adapters: name -> {"kind", "sites"}.
RECORD = "adapters"
# Where they have those that became part of the weights, and what is kept in memory of them.
MERGED = "merged_adapters"
# Where they have those whose tensors are inputs of the program, as they stood under ``RECORD``.
INPUTS = "input_adapters"
# Where they have those that were folded for inference, as they stood under ``RECORD``.
FOLDED = "folded_adapters"
# Where they have the names of those that calls switch and mix, in the order of their weights.
GATED = "gated_adapters"
# Where they have what dimensions were before adapters limited them: name -> dimension -> {"set", "max", "hint"}.
LIMITS = "adapter_limits"


@dataclass(frozen=True)
class InsertedSite:
    """An adapter at one place.

    Attributes:
        path: module path.
        kind: with the options that hold here.
        shapes: see :meth:`Site.shapes`.
        tensors: name of a tensor -> name of the weight.
        exits: the nodes that give adapted values, in order; none once it is merged.
    """

    path: str
    kind: AdapterKind
    shapes: Mapping[str, Any]
    tensors: Mapping[str, str]
    exits: tuple[fx.Node, ...]


@dataclass(frozen=True)
class Inserted:
    """An adapter in a program.

    Attributes:
        name: its name.
        kind: with the options that hold where no site has others.
        sites: by path.
    """

    name: str
    kind: AdapterKind
    sites: Mapping[str, InsertedSite]


def adapters_of(program: Program) -> dict[str, Inserted]:
    """The adapters of a program by name, in the order in which they were put in; merged ones are none any more."""
    exits: dict[str, dict[str, list[fx.Node]]] = {}
    for node in program.nodes:
        for tag in tags_of(node):
            if tag.endswith("/exit"):
                name = tag.removesuffix("/exit").partition("/")[2]
                exits.setdefault(name, {}).setdefault(path_of(node), []).append(node)
    found: dict[str, Inserted] = {}
    for name, record in program.records.get(RECORD, {}).items():
        kind = kind_of(record["kind"], where=f"adapter {name!r}")
        sites = {
            path: InsertedSite(
                path,
                kind_of(site["kind"], where=f"adapter {name!r} at {path}") if "kind" in site else kind,
                {key: value for key, value in site.items() if key not in ("kind", "tensors")},
                site["tensors"],
                tuple(exits.get(name, {}).get(path, ())),
            )
            for path, site in record["sites"].items()
        }
        found[name] = Inserted(name, kind, sites)
    return found


def adapter_of(program: Program, name: str) -> Inserted:
    """One adapter of a program.

    Raises:
        InputError: there is none of that name, it has been merged or folded, or its tensors are inputs.
    """
    found = adapters_of(program)
    if name not in found and name in program.records.get(MERGED, {}):
        raise InputError(
            f"adapter {name!r} has been merged: it is part of the weights and has no tensors of its own",
            where=f"program {program.title!r}",
            hint="take it out of them again with UnmergeAdapters",
        )
    if name not in found and name in program.records.get(FOLDED, {}):
        raise InputError(
            f"adapter {name!r} has been folded: its tensors are combined for inference, and no longer those it was "
            "trained as",
            where=f"program {program.title!r}",
            hint="use the program from before FoldAdapters",
        )
    if name not in found and name in program.records.get(INPUTS, {}):
        raise InputError(
            f"adapter {name!r} has no tensors of its own: they are inputs of the program",
            where=f"program {program.title!r}",
            hint="use the program from before AdaptersAsInputs",
        )
    if name not in found:
        raise InputError(
            f"there is no adapter {name!r}",
            where=f"program {program.title!r}",
            hint=f"it has {', '.join(map(repr, found))}" if found else "insert one with InsertAdapters",
        )
    return found[name]


def base_of(node: fx.Node, name: str) -> fx.Node:
    """The value that stands without an adapter where ``node`` gives the adapted one: first operands lead to it.

    What the same adapter gives elsewhere, such as at the layer before, is where it ends.
    """
    tag, end = tag_of(name), exit_tag(name)
    while tag in tags_of(node):
        first = node.args[0]
        assert isinstance(first, fx.Node)
        node = first
        if end in tags_of(node):
            break
    return node


def fed_by(node: fx.Node, name: str) -> fx.Node | None:
    """The layer that reads ``node`` as its input, where an adapter changes that; ``None`` where it changes a value."""
    if fed_tag(name) not in tags_of(node):
        return None
    readers = [user for user in node.users if tag_of(name) not in tags_of(user)]
    return readers[0] if len(readers) == 1 else None


def note_inserted(
    program: Program, name: str, kind: AdapterKind, sites: Mapping[str, tuple[AdapterKind, Mapping[str, Any]]]
) -> None:
    """Write an adapter down in the program's records.

    Args:
        program: where it was put in.
        name: of the adapter.
        kind: its kind.
        sites: by path, the kind that holds there and what :class:`InsertedSite` has of it, as JSON values.
    """
    table = {path: {**said, **({"kind": described(own)} if own != kind else {})} for path, (own, said) in sites.items()}
    program.records.setdefault(RECORD, {})[name] = {"kind": described(kind), "sites": table}


def forget(program: Program, name: str) -> None:
    """Strike an adapter from the program's records."""
    records = program.records[RECORD]
    del records[name]
    if not records:
        del program.records[RECORD]


def described(kind: AdapterKind) -> dict[str, Any]:
    """A kind as JSON values, which :func:`kind_of` reads back."""
    options = {key: list(value) if isinstance(value, tuple) else value for key, value in kind.options().items()}
    return {"kind": kind.kind, **options}


def adapter_tensors(program: Program, name: str) -> dict[str, torch.Tensor]:
    """The tensors of an adapter by the names of their weights; shared ones once.

    Raises:
        InputError: there is none of that name.
    """
    weights = {weight for site in adapter_of(program, name).sites.values() for weight in site.tensors.values()}
    return {weight: program.tensor(weight) for weight in sorted(weights)}


def checked_names(owner: str, names: object) -> tuple[str, ...] | None:
    """The option ``adapters`` of a pass as a tuple; ``None`` for all of a program.

    Args:
        owner: the pass, for the message.
        names: what was given.

    Raises:
        InputError: it is no list of names.
    """
    if names is None:
        return None
    if isinstance(names, str) or not isinstance(names, tuple | list) or not all(isinstance(n, str) for n in names):
        raise InputError(f"must be names of adapters, not {names!r}", where=f"{owner}: adapters")
    return tuple(names)
