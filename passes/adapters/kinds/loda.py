"""LoDA and LoDA+: low-rank adaptation that is not linear."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from graphwright.ir.errors import InputError
from graphwright.ir.pattern import Refusal
from graphwright.ir.program import Program
from graphwright.passes.adapters.base import AdapterKind, Draw, Factor, check_rank, finite, whole
from graphwright.passes.adapters.builder import Builder
from graphwright.passes.adapters.projections import behind_reduction
from graphwright.passes.adapters.sites import Site, linear_sites, refusal
from graphwright.passes.selection import Predicate

_SLOPE = 0.8
_EPS = 1e-5
OUTER = ("", "activation", "norm", "norm+activation")


@dataclass(frozen=True)
class LoDA(AdapterKind):
    """``y = x Wᵀ + s · (x A B + f₁(x A) B)``, and LoDA+ ``s · (x A B + f₂(f₁(x A) B))`` (Liu et al., "LoDA").

    ``f₁`` is two r × r linears without bias, between them a layer norm without parameters and LeakyReLU of slope 0.8;
    ``f₂`` is what ``outer`` says, of the same. Trains ``2 (r d + r²)`` numbers a linear of width d, LoDA+ no more.
    LoDA multiplies by B once, as ``(x A + f₁(x A)) B``, LoDA+ twice. ``A`` and ``f₁`` start Kaiming-uniform, ``B`` at
    0.

    R-LoDA and S-LoDA, also with +, are this beside a base that :class:`ReduceProjections` has made smaller.

    Attributes:
        rank: r.
        alpha: the scale is ``alpha / rank``; ``None`` for a scale of 1.
        outer: f₂: ``""`` for none (LoDA), ``activation``, ``norm`` or ``norm+activation`` (LoDA+).
    """

    kind: ClassVar[str] = "loda"
    unmergeable: ClassVar[str | None] = "its map between the low-rank factors is not linear"

    rank: int = 4
    alpha: float | None = None
    outer: str = ""

    def __post_init__(self) -> None:
        whole(self.kind, "rank", self.rank)
        if self.alpha is not None:
            finite(self.kind, "alpha", self.alpha)
        if self.outer not in OUTER:
            raise InputError(f"must be one of {OUTER}, not {self.outer!r}", where=f"{self.kind}: outer")

    @property
    def scale(self) -> float:
        """The factor of the branch."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def sites(self, program: Program, selected: Predicate, *, head: bool) -> Iterator[Site | Refusal]:
        """Linears; of one that was taken apart (:class:`ReduceProjections`), the input of the whole counts."""
        for found in linear_sites(program, selected, head=head):
            if isinstance(found, Refusal):
                yield found
                continue
            site = behind_reduction(found)
            yield refusal(found.node, site) if isinstance(site, str) else site

    def check(self, site: Site) -> str | None:
        """A rank above the weight's smaller side is an error."""
        check_rank(self.kind, self.rank, site)
        return None

    def factors(self, site: Site, draw: Draw) -> dict[str, Factor]:
        """``loda_A [r, in]``, ``loda_B [out, r]``, ``loda_first [r, r]``, ``loda_second [r, r]``."""
        out, into = site.features
        rank, dtype = self.rank, site.dtype
        return {
            "loda_A": Factor(draw.kaiming_uniform(rank, into).to(dtype)),
            "loda_first": Factor(draw.kaiming_uniform(rank, rank).to(dtype)),
            "loda_second": Factor(draw.kaiming_uniform(rank, rank).to(dtype)),
            "loda_B": Factor(torch.zeros(out, rank, dtype=dtype)),
        }

    def build(self, builder: Builder, site: Site, factors: Mapping[str, fx.Node]) -> None:
        """The scale goes where the numbers are fewest."""
        low = builder.linear(site.x, factors["loda_A"])
        curved = _activation(builder, _norm(builder, builder.linear(low, factors["loda_first"]), self.rank))
        curved = builder.linear(curved, factors["loda_second"])
        if not self.outer:
            branch = builder.linear(builder.scaled(builder.plus(low, curved), self.scale), factors["loda_B"])
        else:
            outer = builder.linear(curved, factors["loda_B"])
            if "norm" in self.outer:
                outer = _norm(builder, outer, site.features[0])
            if "activation" in self.outer:
                outer = _activation(builder, outer)
            branch = builder.scaled(builder.plus(builder.linear(low, factors["loda_B"]), outer), self.scale)
        builder.adapt(site.node, builder.plus(site.node, branch))


def _norm(builder: Builder, x: fx.Node, width: int) -> fx.Node:
    return builder.call("aten.layer_norm", x, [width], None, None, _EPS)


def _activation(builder: Builder, x: fx.Node) -> fx.Node:
    return builder.call("aten.leaky_relu", x, _SLOPE)
