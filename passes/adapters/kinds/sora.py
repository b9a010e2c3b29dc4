"""SoRA: LoRA with a gate on each rank, which training closes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from graphwright.passes.adapters.base import AdapterKind, Dense, Draw, Factor, check_rank, finite, whole
from graphwright.passes.adapters.builder import Builder
from graphwright.passes.adapters.sites import Site


@dataclass(frozen=True)
class SoRA(AdapterKind):
    """``y = x Wᵀ + s · (g ⊙ (x Aᵀ)) Bᵀ`` with ``A [r, in]``, ``B [out, r]``, ``g [r]`` (Ding et al. 2023, "SoRA").

    After each step of the optimiser :func:`shrink_gates` moves the gates towards 0 (the proximal step), and
    :class:`DeleteRanks` takes out those that are there, which leaves the function as it is. Trains ``r (in + out) + r``
    numbers a linear: ``A`` starts Kaiming-uniform, ``B`` at 0, ``g`` normal, as the authors' code has it.

    Attributes:
        rank: r at the start.
        scale: s.
    """

    kind: ClassVar[str] = "sora"

    rank: int = 8
    scale: float = 1.0

    def __post_init__(self) -> None:
        whole(self.kind, "rank", self.rank)
        finite(self.kind, "scale", self.scale)

    def check(self, site: Site) -> str | None:
        """A rank above the weight's smaller side is an error."""
        check_rank(self.kind, self.rank, site)
        return None

    def factors(self, site: Site, draw: Draw) -> dict[str, Factor]:
        """``sora_A [r, in]``, ``sora_B [out, r]``, ``sora_gate [r]``."""
        out, into = site.features
        return {
            "sora_A": Factor(draw.kaiming_uniform(self.rank, into).to(site.dtype)),
            "sora_B": Factor(torch.zeros(out, self.rank, dtype=site.dtype)),
            "sora_gate": Factor(draw.normal(self.rank).to(site.dtype)),
        }

    def build(self, builder: Builder, site: Site, factors: Mapping[str, fx.Node]) -> None:
        """The gates, with the scale, are a product between the two linears."""
        gate = builder.scaled(factors["sora_gate"], self.scale)
        hidden = builder.call("aten.mul.Tensor", builder.linear(site.x, factors["sora_A"]), gate)
        builder.adapt(site.node, builder.plus(site.node, builder.linear(hidden, factors["sora_B"])))

    def merged(self, site: Site, dense: Dense, factors: Mapping[str, torch.Tensor]) -> Dense:
        """``W + s B diag(g) A``."""
        product = (factors["sora_B"] * factors["sora_gate"]) @ factors["sora_A"]
        return Dense(dense.weight + self.scale * product, dense.bias)
