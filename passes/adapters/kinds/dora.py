"""DoRA: LoRA on the direction of a weight's rows, with their lengths trained beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from graphwright.passes.adapters.base import AdapterKind, Dense, Draw, Factor, check_rank, finite, whole
from graphwright.passes.adapters.builder import Builder
from graphwright.passes.adapters.kinds.lora import scaling
from graphwright.passes.adapters.sites import Site


@dataclass(frozen=True)
class DoRA(AdapterKind):
    """``y = x (m ⊙ V / ‖V‖)ᵀ + b`` with ``V = W + s B A`` and the norm of each row (Liu et al. 2024, eq. 5).

    The norm gets no gradient, as the authors have it (section 4.3). Trains ``r (in + out) + out`` numbers a linear:
    ``A [r, in]`` starts Kaiming-uniform, ``B [out, r]`` at 0, ``m [out]`` at the rows' norms. It reads the weight, so
    it needs one in floating point.

    Attributes:
        rank: r.
        alpha: the scale is ``alpha / rank``; ``None`` for a scale of 1.
        rank_stabilized: the scale is ``alpha / √rank``.
    """

    kind: ClassVar[str] = "dora"
    stored: ClassVar[bool] = True

    rank: int = 8
    alpha: float | None = None
    rank_stabilized: bool = False

    def __post_init__(self) -> None:
        whole(self.kind, "rank", self.rank)
        if self.alpha is not None:
            finite(self.kind, "alpha", self.alpha)

    @property
    def scale(self) -> float:
        """The factor of ``B A``."""
        return scaling(self.rank, self.alpha, rank_stabilized=self.rank_stabilized)

    def check(self, site: Site) -> str | None:
        """A packed weight has no norm to read; a rank above the weight's smaller side is an error."""
        if site.packed:
            return "dora reads the weight, which must be in floating point; it is packed (insert it before quantising)"
        check_rank(self.kind, self.rank, site)
        return None

    def factors(self, site: Site, draw: Draw) -> dict[str, Factor]:
        """``lora_A [r, in]``, ``lora_B [out, r]`` and ``magnitude [out]``."""
        out, into = site.features
        return {
            "lora_A": Factor(draw.kaiming_uniform(self.rank, into).to(site.dtype)),
            "lora_B": Factor(torch.zeros(out, self.rank, dtype=site.dtype)),
            "magnitude": Factor(torch.linalg.vector_norm(site.dense(), 2, 1).to(site.dtype)),
        }

    def like(self, site: Site) -> dict[str, Factor]:
        """A saved one has its lengths; no norm is computed."""
        out, into = site.features
        shapes = {"lora_A": (self.rank, into), "lora_B": (out, self.rank), "magnitude": (out,)}
        return {key: Factor(torch.empty(shape, dtype=site.dtype)) for key, shape in shapes.items()}

    def build(self, builder: Builder, site: Site, factors: Mapping[str, fx.Node]) -> None:
        """``y + (m / ‖V‖ - 1) (y - b) + m / ‖V‖ · s (x Aᵀ) Bᵀ``: the layer runs as it is, and V x is never formed."""
        assert site.weight is not None
        weight = builder.call("aten.t", site.weight) if site.transposed else site.weight
        delta = builder.scaled(builder.call("aten.mm", factors["lora_B"], factors["lora_A"]), self.scale)
        norm = builder.call("aten.linalg_vector_norm", builder.plus(weight, delta), 2, [1])
        ratio = builder.call("aten.div.Tensor", factors["magnitude"], builder.call("aten.detach", norm))
        bare = site.node if site.bias is None else builder.call("aten.sub.Tensor", site.node, site.bias)
        stretched = builder.call("aten.mul.Tensor", bare, builder.call("aten.sub.Tensor", ratio, 1.0))
        hidden = builder.scaled(builder.linear(site.x, factors["lora_A"]), self.scale)
        turned = builder.call("aten.mul.Tensor", builder.linear(hidden, factors["lora_B"]), ratio)
        builder.adapt(site.node, builder.plus(builder.plus(site.node, stretched), turned))

    def merged(self, site: Site, dense: Dense, factors: Mapping[str, torch.Tensor]) -> Dense:
        """``m ⊙ V / ‖V‖``."""
        direction = dense.weight + self.scale * factors["lora_B"] @ factors["lora_A"]
        ratio = factors["magnitude"] / torch.linalg.vector_norm(direction, 2, 1)
        return Dense(direction * ratio.unsqueeze(1), dense.bias)
