"""Branches that a quantiser puts beside its linears, written down as an adapter like any other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from graphwright.ir import provenance
from graphwright.ir.errors import InputError
from graphwright.ir.program import Program
from graphwright.ir.provenance import path_of
from graphwright.ir.types import VAL
from graphwright.passes.adapters.base import AdapterKind
from graphwright.passes.adapters.builder import exit_tag, tag_of
from graphwright.passes.adapters.inserted import adapters_of, note_inserted
from graphwright.passes.adapters.kinds.lora import LoRA
from graphwright.passes.adapters.sites import ADAPTER


def adopt_branches(program: Program, sums: Sequence[fx.Node], name: str) -> None:
    """Make LoRA factors that lie beside linears an adapter of the program, or further sites of the one there is.

    Args:
        program: where.
        sums: ``add(y, linear(linear(x, A), B))``, each in its linear's module; ``A`` and ``B`` are weights whose names
            end in ``.lora_A.NAME`` and ``.lora_B.NAME``.
        name: of the adapter.

    Raises:
        InputError: there is an adapter of that name, and it is of another kind.
    """
    present = adapters_of(program).get(name)
    if present is not None and not isinstance(present.kind, LoRA):
        raise InputError(
            f"there is an adapter {name!r} already, which is {present.kind.kind}",
            where=f"program {program.title!r}",
            hint="take it out, or give it another name",
        )
    table: dict[str, tuple[AdapterKind, dict[str, Any]]] = {}
    for path, site in present.sites.items() if present is not None else ():
        table[path] = site.kind, {**site.shapes, "tensors": dict(site.tensors)}
    for total in sums:
        branch = _node(total, 1)
        hidden, b = _node(branch, 0), _node(branch, 1)
        x, a = _node(hidden, 0), _node(hidden, 1)
        for node in (total, branch, hidden, a, b):
            node.meta[provenance.TAGS] = frozenset({ADAPTER, tag_of(name)})
        total.meta[provenance.TAGS] |= {exit_tag(name)}
        features = [int(total.meta[VAL].shape[-1]), int(x.meta[VAL].shape[-1])]
        tensors = {"lora_A": str(a.target), "lora_B": str(b.target)}
        kind = LoRA(rank=int(a.meta[VAL].shape[0]))
        table[path_of(total)] = kind, {"op": "linear", "features": features, "tensors": tensors}
    ranks = [kind.rank for kind, _ in table.values() if isinstance(kind, LoRA)]
    note_inserted(program, name, LoRA(rank=max(ranks)), table)


def _node(node: fx.Node, index: int) -> fx.Node:
    found = node.args[index]
    assert isinstance(found, fx.Node)
    return found
