"""LoRA-XS: a small trained matrix between the leading singular vectors of the weight."""

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
class LoRAXS(AdapterKind):
    """``y = x Wᵀ + s · x (B R A)ᵀ`` with ``W ≈ U Σ Vᵀ``, ``B = U_r Σ_r``, ``A = V_rᵀ`` (Bałazy et al. 2024).

    Trains ``R [r, r]`` only: ``r²`` numbers a linear. ``R`` starts normal. ``A [r, in]`` and ``B [out, r]`` are frozen
    and saved, because singular vectors of equal values, and all signs, differ between machines. Of a packed weight they
    are those of what its codes stand for.

    Attributes:
        rank: r.
        alpha: the scale is ``alpha / rank``; ``None`` for a scale of 1.
        std: of ``R`` at the start; the paper's is 1e-5. 0 starts as the identity.
    """

    kind: ClassVar[str] = "lora-xs"

    rank: int = 8
    alpha: float | None = None
    std: float = 1e-5

    def __post_init__(self) -> None:
        whole(self.kind, "rank", self.rank)
        finite(self.kind, "std", self.std)
        if self.alpha is not None:
            finite(self.kind, "alpha", self.alpha)

    @property
    def scale(self) -> float:
        """The factor of the branch."""
        return scaling(self.rank, self.alpha)

    def starts_as_identity(self) -> bool:
        """Where ``R`` is 0."""
        return self.std == 0

    def check(self, site: Site) -> str | None:
        """A rank above the weight's smaller side is an error."""
        check_rank(self.kind, self.rank, site)
        return None

    def factors(self, site: Site, draw: Draw) -> dict[str, Factor]:
        """``xs_R [r, r]``, and the frozen ``xs_A [r, in]`` and ``xs_B [out, r]``."""
        u, values, v = torch.linalg.svd(site.dense().float(), full_matrices=False)
        b, a = u[:, : self.rank] * values[: self.rank], v[: self.rank]
        return {
            "xs_R": Factor(draw.normal(self.rank, self.rank, std=self.std).to(site.dtype)),
            "xs_A": Factor(a.to(site.dtype).contiguous(), trained=False),
            "xs_B": Factor(b.to(site.dtype).contiguous(), trained=False),
        }

    def like(self, site: Site) -> dict[str, Factor]:
        """A saved one has its matrices; nothing is decomposed."""
        out, into = site.features
        shapes = {"xs_R": (self.rank, self.rank), "xs_A": (self.rank, into), "xs_B": (out, self.rank)}
        return {key: Factor(torch.empty(shape, dtype=site.dtype), key == "xs_R") for key, shape in shapes.items()}

    def build(self, builder: Builder, site: Site, factors: Mapping[str, fx.Node]) -> None:
        """Three linears."""
        hidden = builder.linear(builder.linear(site.x, factors["xs_A"]), factors["xs_R"])
        branch = builder.linear(builder.scaled(hidden, self.scale), factors["xs_B"])
        builder.adapt(site.node, builder.plus(site.node, branch))

    def merged(self, site: Site, dense: Dense, factors: Mapping[str, torch.Tensor]) -> Dense:
        """``W + s B R A``."""
        return Dense(dense.weight + self.scale * factors["xs_B"] @ factors["xs_R"] @ factors["xs_A"], dense.bias)
