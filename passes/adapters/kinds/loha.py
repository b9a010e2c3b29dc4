"""LoHa: the elementwise product of two low-rank matrices beside a layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from graphwright.ir.pattern import Refusal
from graphwright.ir.program import Program
from graphwright.passes.adapters.base import AdapterKind, Dense, Draw, Factor, check_rank, finite, whole
from graphwright.passes.adapters.builder import Builder
from graphwright.passes.adapters.kinds.lora import scaling
from graphwright.passes.adapters.layers import check_ops, layer_sites
from graphwright.passes.adapters.sites import Site
from graphwright.passes.selection import Predicate


@dataclass(frozen=True)
class LoHa(AdapterKind):
    """``y = x Wᵀ + s · x ((A₁ B₁) ⊙ (A₂ B₂))ᵀ``, of rank up to ``r²`` (Hyeon-Woo et al. 2022, "FedPara", prop. 1).

    Trains ``2 r (in + out)`` numbers a linear. ``B₂`` starts at 0, the others Kaiming-uniform. A convolution's weight
    is taken as a matrix ``[out, in / groups · ∏k]``. The product is formed at every step, as large as the weight.

    Attributes:
        rank: r of each of the two.
        alpha: the scale is ``alpha / rank``; ``None`` for a scale of 1.
        ops: of the layers it goes to: ``linear``, ``conv``.
    """

    kind: ClassVar[str] = "loha"

    rank: int = 8
    alpha: float | None = None
    ops: tuple[str, ...] = ("linear",)

    def __post_init__(self) -> None:
        whole(self.kind, "rank", self.rank)
        if self.alpha is not None:
            finite(self.kind, "alpha", self.alpha)
        object.__setattr__(self, "ops", check_ops(self.kind, self.ops, ("linear", "conv")))

    @property
    def scale(self) -> float:
        """The factor of the branch."""
        return scaling(self.rank, self.alpha)

    def sites(self, program: Program, selected: Predicate, *, head: bool) -> Iterator[Site | Refusal]:
        """Layers of the ``ops``."""
        return layer_sites(program, selected, self.ops, kind=self.kind, head=head)

    def check(self, site: Site) -> str | None:
        """A rank above the weight's smaller side is an error."""
        check_rank(self.kind, self.rank, site)
        return None

    def factors(self, site: Site, draw: Draw) -> dict[str, Factor]:
        """``hada_w1_a [out, r]``, ``hada_w1_b [r, in]``, and the same of ``hada_w2``."""
        out, into = site.features[0], site.features[1] // site.groups * torch.Size(site.kernel).numel()
        found = {
            "hada_w1_a": draw.kaiming_uniform(out, self.rank),
            "hada_w1_b": draw.kaiming_uniform(self.rank, into),
            "hada_w2_a": draw.kaiming_uniform(out, self.rank),
            "hada_w2_b": torch.zeros(self.rank, into),
        }
        return {key: Factor(value.to(site.dtype)) for key, value in found.items()}

    def build(self, builder: Builder, site: Site, factors: Mapping[str, fx.Node]) -> None:
        """The scale goes to a thin matrix."""
        one = builder.call("aten.mm", builder.scaled(factors["hada_w1_a"], self.scale), factors["hada_w1_b"])
        two = builder.call("aten.mm", factors["hada_w2_a"], factors["hada_w2_b"])
        weight = builder.call("aten.mul.Tensor", one, two)
        if site.op == "conv":
            weight = builder.call(
                "aten.view", weight, [site.features[0], site.features[1] // site.groups, *site.kernel]
            )
        builder.adapt(site.node, builder.plus(site.node, builder.through(weight)))

    def merged(self, site: Site, dense: Dense, factors: Mapping[str, torch.Tensor]) -> Dense:
        """``W + s (A₁ B₁) ⊙ (A₂ B₂)``."""
        one, two = (factors[f"hada_{key}_a"] @ factors[f"hada_{key}_b"] for key in ("w1", "w2"))
        return Dense(dense.weight + (self.scale * one * two).view_as(dense.weight), dense.bias)
