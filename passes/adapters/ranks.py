"""SoRA's gates: the step that closes them, and the pass that deletes the ranks of those that are closed."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from graphwright.ir.errors import InputError
from graphwright.ir.program import Program
from graphwright.ir.rewriter import Rewriter
from graphwright.ir.types import VAL
from graphwright.passes.adapters.base import AdapterKind, Factor, finite
from graphwright.passes.adapters.builder import Builder
from graphwright.passes.adapters.inserted import (
    Inserted,
    InsertedSite,
    adapter_of,
    adapters_of,
    base_of,
    checked_names,
    forget,
    note_inserted,
)
from graphwright.passes.adapters.kinds.sora import SoRA
from graphwright.passes.adapters.sites import Site
from graphwright.passes.base import Pass
from graphwright.passes.contract import Contract, Exact


def shrink_gates(program: Program, threshold: float, name: str = "default") -> tuple[int, int]:
    """Move SoRA's gates towards 0 by ``threshold``; those nearer than that become 0 (Ding et al. 2023).

    To be called after each step of the optimiser, with the learning rate times the weight of the penalty.

    Args:
        program: in place.
        threshold: 0 or more.
        name: of the adapter.

    Returns:
        how many gates are open, and how many there are.

    Raises:
        InputError: there is no such adapter, it has no gates, or the threshold is negative or not finite.
    """
    finite("shrink_gates", "threshold", threshold)
    if threshold < 0:
        raise InputError(f"must be 0 or more, not {threshold!r}", where="shrink_gates: threshold")
    open_, total = 0, 0
    for site in _gated(adapter_of(program, name)).sites.values():
        gate = program.tensor(site.tensors["sora_gate"])
        with torch.no_grad():
            gate.copy_(torch.nn.functional.softshrink(gate, threshold))
        open_, total = open_ + int(gate.count_nonzero()), total + gate.numel()
    return open_, total


@dataclass(frozen=True, kw_only=True)
class DeleteRanks(Pass):
    """Delete the ranks of SoRA's adapters whose gate is 0; the function stays.

    ::

        %hidden = aten.linear(%x, %sora_A)          [8, in], of which 3 have a gate of 0
        ->
        %hidden = aten.linear(%x, %sora_A)          [5, in]

    A layer none of whose gates is open loses its adapter. Optimisers hold the old tensors: make a new one.

    It does not fire where every gate is open.

    Attributes:
        adapters: names of SoRA's; ``None`` for all of them.
    """

    name: ClassVar[str] = "delete-ranks"
    contract: ClassVar[Contract] = Exact()
    respects: ClassVar[frozenset[str]] = frozenset()

    adapters: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "adapters", checked_names(self.name, self.adapters))

    def run(self, program: Program) -> bool:
        """Delete them.

        Raises:
            InputError: there is no such adapter, or it has no gates.
        """
        if self.adapters is None:
            chosen = [each for each in adapters_of(program).values() if isinstance(each.kind, SoRA)]
        else:
            chosen = [_gated(adapter_of(program, each)) for each in self.adapters]
        before = after = 0
        with program.edit() as rewriter:
            for adapter in chosen:
                noted: dict[str, tuple[AdapterKind, Mapping[str, Any]]] = {}
                for path, site in adapter.sites.items():
                    gate = program.tensor(site.tensors["sora_gate"]).detach()
                    kept = gate.nonzero().flatten()
                    before, after = before + gate.numel(), after + kept.numel()
                    tensors, kind = dict(site.tensors), site.kind
                    if kept.numel() < gate.numel():
                        tensors = _keep(rewriter, adapter.name, site, kept)
                        kind = dataclasses.replace(kind, rank=kept.numel()) if tensors else kind  # type: ignore[call-arg]
                    if tensors:
                        noted[path] = (kind, {**site.shapes, "tensors": tensors})
                if noted:
                    note_inserted(program, adapter.name, adapter.kind, noted)
                else:
                    forget(program, adapter.name)
        program.notes.update(ranks_before=before, ranks_after=after)
        return after < before


def _keep(rewriter: Rewriter, name: str, site: InsertedSite, kept: torch.Tensor) -> dict[str, str]:
    """Build an adapter anew with some of its ranks; its weights, none where it is gone."""
    program = rewriter.program
    old = {key: program.tensor(weight).detach() for key, weight in site.tensors.items()}
    weight = site.tensors["sora_A"]
    readers = [user for node in program.nodes if node.op == "get_attr" and node.target == weight for user in node.users]
    places: list[tuple[str, Site, list[fx.Node]]] = []
    for exit_, reader in zip(site.exits, sorted(readers), strict=True):
        base, x = base_of(exit_, name), reader.args[0]
        assert isinstance(x, fx.Node)
        features = (int(base.meta[VAL].shape[-1]), int(x.meta[VAL].shape[-1]))
        place = Site(site.path, base, x, "", features, base.meta[VAL].dtype)
        places.append((exit_.name, place, list(exit_.users)))
        rewriter.replace(exit_, base, equivalent=False)
    program.drop_unused_tensors()  # the new ones have their names
    if not kept.numel():
        return {}
    factors = {
        "sora_A": Factor(old["sora_A"][kept].clone()),
        "sora_B": Factor(old["sora_B"][:, kept].clone()),
        "sora_gate": Factor(old["sora_gate"][kept].clone()),
    }
    nodes = Builder(rewriter, name, places[0][1]).weights(factors)
    kind = dataclasses.replace(site.kind, rank=kept.numel())  # type: ignore[call-arg]
    for was, place, users in places:
        builder = _Again(rewriter, name, place, users)
        kind.build(builder, place, nodes)
        program.replacements[was] = builder.exits[0].name
    return {key: str(node.target) for key, node in nodes.items()}


class _Again(Builder):
    """Puts an adapter where it stood: between what it read, and those who read it, which may be other adapters."""

    def __init__(self, rewriter: Rewriter, name: str, site: Site, users: Collection[fx.Node]) -> None:
        super().__init__(rewriter, name, site)
        self._users = users

    def adapt(self, old: fx.Node, new: fx.Node, *, besides: Collection[fx.Node] = (), retyped: bool = False) -> None:
        """Let the users of before read ``new``; it stands for the old exit, not for ``old``."""
        others = {user for user in old.users if user not in self._users}
        self.rewriter.redirect(old, new, besides={*others, *besides}, equivalent=False)
        self._exit(new)

    def _standing(self, value: fx.Node) -> fx.Node:
        return value


def _gated(adapter: Inserted) -> Inserted:
    if not isinstance(adapter.kind, SoRA):
        raise InputError(
            f"adapter {adapter.name!r} is {adapter.kind.kind}, which has no gates",
            where="shrink_gates, delete-ranks",
            hint="gates are SoRA's",
        )
    return adapter
