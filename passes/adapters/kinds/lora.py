"""LoRA: a product of two thin matrices beside a linear."""

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
class LoRA(AdapterKind):
    """``y = x Wᵀ + s · (x Aᵀ) Bᵀ`` with ``A [r, in]``, ``B [out, r]`` (Hu et al. 2021, eq. 3).

    Trains ``r (in + out)`` numbers a linear. ``A`` starts Kaiming-uniform, ``B`` at 0.

    Attributes:
        rank: r.
        alpha: the scale is ``alpha / rank``; ``None`` for a scale of 1.
        rank_stabilized: the scale is ``alpha / √rank`` (Kalajdzievski 2023, "rsLoRA").
    """

    kind: ClassVar[str] = "lora"

    rank: int = 8
    alpha: float | None = None
    rank_stabilized: bool = False

    def __post_init__(self) -> None:
        whole(self.kind, "rank", self.rank)
        if self.alpha is not None:
            finite(self.kind, "alpha", self.alpha)

    @property
    def scale(self) -> float:
        """The factor of the branch."""
        if self.alpha is None:
            return 1.0
        return self.alpha / (self.rank**0.5 if self.rank_stabilized else self.rank)

    def check(self, site: Site) -> str | None:
        """A rank above the weight's smaller side is an error."""
        check_rank(self.kind, self.rank, site)
        return None

    def factors(self, site: Site, draw: Draw) -> dict[str, Factor]:
        """``lora_A [r, in]`` and ``lora_B [out, r]``."""
        out, into = site.features
        return {
            "lora_A": Factor(draw.kaiming_uniform(self.rank, into).to(site.dtype)),
            "lora_B": Factor(torch.zeros(out, self.rank, dtype=site.dtype)),
        }

    def build(self, builder: Builder, site: Site, factors: Mapping[str, fx.Node]) -> None:
        """The scale goes where the numbers are fewest."""
        hidden = builder.scaled(builder.linear(site.x, factors["lora_A"]), self.scale)
        builder.adapt(site.node, builder.plus(site.node, builder.linear(hidden, factors["lora_B"])))

    def merged(self, site: Site, dense: Dense, factors: Mapping[str, torch.Tensor]) -> Dense:
        """``W + s B A``."""
        return Dense(dense.weight + self.scale * factors["lora_B"] @ factors["lora_A"], dense.bias)
