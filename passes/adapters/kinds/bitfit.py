"""BitFit: only biases train."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from graphwright.ir.arguments import arguments_of
from graphwright.ir.names import op_name
from graphwright.ir.pattern import Refusal
from graphwright.ir.program import Program
from graphwright.ir.provenance import path_of, tags_of
from graphwright.ir.types import fake_of
from graphwright.passes.adapters.base import AdapterKind, Dense, Draw, Factor
from graphwright.passes.adapters.builder import Builder
from graphwright.passes.adapters.sites import ADAPTER, Site, linear_site, linear_sites, refusal
from graphwright.passes.selection import Predicate


@dataclass(frozen=True)
class BitFit(AdapterKind):
    """``y = x Wᵀ + b + δ``: the biases of linears and norms train (Ben Zaken et al. 2022).

    δ starts at 0. Trains as many numbers as the biases have. What is trained is the difference and not the bias, which
    several adapters on one base have together.

    Attributes:
        norms: those of layer norms too.
        missing: give a bias to linears that have none, where the method would leave them alone.
    """

    kind: ClassVar[str] = "bitfit"

    norms: bool = True
    missing: bool = False

    def sites(self, program: Program, selected: Predicate, *, head: bool) -> Iterator[Site | Refusal]:
        """Linears and norms."""
        yield from linear_sites(program, selected, head=head)
        if not self.norms:
            return
        for node in program.nodes:
            found = _norm_site(node)
            if found is None or ADAPTER in tags_of(node):
                continue
            if isinstance(found, Site) and not selected(node):
                found = "not selected by where= / ignore="
            yield found if isinstance(found, Site) else refusal(node, found)

    def site_at(self, program: Program, node: fx.Node) -> Site | str | None:
        """A linear or a norm."""
        norm = _norm_site(node)
        return linear_site(program, node) if norm is None else norm

    def check(self, site: Site) -> str | None:
        """Linears without bias are left alone."""
        if site.bias is None and not self.missing:
            return "it has no bias (missing=True gives it one)"
        return None

    def factors(self, site: Site, draw: Draw) -> dict[str, Factor]:
        """``bitfit_delta [out]``."""
        return {"bitfit_delta": Factor(torch.zeros(site.features[0], dtype=site.dtype))}

    def build(self, builder: Builder, site: Site, factors: Mapping[str, fx.Node]) -> None:
        """A sum."""
        builder.adapt(site.node, builder.plus(site.node, factors["bitfit_delta"]))

    def merged(self, site: Site, dense: Dense, factors: Mapping[str, torch.Tensor]) -> Dense:
        """``b + δ``."""
        delta = factors["bitfit_delta"]
        return Dense(dense.weight, delta if dense.bias is None else dense.bias + delta)


def _norm_site(node: fx.Node) -> Site | str | None:
    if op_name(node) != "aten.layer_norm":
        return None
    given = arguments_of(node)
    x, weight, bias = given["input"], given["weight"], given["bias"]
    if bias is None or bias.op != "get_attr":
        return "the norm has no bias of its own"
    if len(given["normalized_shape"]) != 1 or weight is None or weight.op != "get_attr":
        return "the norm is over several dimensions, or has no weight"
    width = int(given["normalized_shape"][0])
    return Site(path_of(node), node, x, "input", (width, width), fake_of(node).dtype, weight, bias, op="norm")
