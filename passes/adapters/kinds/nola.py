"""NOLA: LoRA whose matrices are sums of random ones, of which the coefficients are trained."""

from __future__ import annotations

import functools
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
class NOLA(AdapterKind):
    """``y = x Wᵀ + s · (x Aᵀ) Bᵀ``, ``A = Σᵢ αᵢ Aᵢ``, ``B = Σⱼ βⱼ Bⱼ`` (Koohpayegani et al. 2024, "NOLA").

    The ``Aᵢ [r, in]`` and ``Bⱼ [out, r]`` are random and frozen; linears of one width share them. Trains ``2 k``
    numbers a linear, whatever its rank and shape. ``α`` starts normal with variance ``1 / k``, so that ``A`` is as
    large as one ``Aᵢ``; ``β`` at 0. The matrices are not saved: the seed gives them again.

    Attributes:
        bases: k of each.
        rank: r.
        alpha: the scale is ``alpha / rank``; ``None`` for a scale of 1.
        seed: of the random matrices, which are Kaiming-uniform.
        save_bases: save them too: PyTorch promises the same random numbers on the same release and machine only.
    """

    kind: ClassVar[str] = "nola"

    bases: int = 64
    rank: int = 8
    alpha: float | None = None
    seed: int = 0
    save_bases: bool = False

    def __post_init__(self) -> None:
        whole(self.kind, "bases", self.bases)
        whole(self.kind, "rank", self.rank)
        whole(self.kind, "seed", self.seed, least=0)
        if self.alpha is not None:
            finite(self.kind, "alpha", self.alpha)

    @property
    def scale(self) -> float:
        """The factor of the branch."""
        return scaling(self.rank, self.alpha)

    def drawn(self) -> frozenset[str]:
        """The random matrices, unless they are saved."""
        return frozenset() if self.save_bases else frozenset({"nola_A_bases", "nola_B_bases"})

    def check(self, site: Site) -> str | None:
        """A rank above the weight's smaller side is an error."""
        check_rank(self.kind, self.rank, site)
        return None

    def factors(self, site: Site, draw: Draw) -> dict[str, Factor]:
        """``nola_alpha [1, k]``, ``nola_beta [1, k]``, and the shared ``nola_A_bases [k, r in]``, ``nola_B_bases``."""
        found = {
            "nola_alpha": Factor(draw.normal(1, self.bases, std=self.bases**-0.5).to(site.dtype)),
            "nola_beta": Factor(torch.zeros(1, self.bases, dtype=site.dtype)),
        }
        for side, size in zip("BA", site.features, strict=True):
            shape = (self.rank, size) if side == "A" else (size, self.rank)
            drawn = _bases(self.seed, side, self.bases, *shape).to(site.dtype)
            # ranks and numbers may differ between sites
            shared = f"nola_{side}_{self.seed}_{self.bases}_{'x'.join(map(str, shape))}"
            found[f"nola_{side}_bases"] = Factor(drawn, trained=False, shared=shared)
        return found

    def build(self, builder: Builder, site: Site, factors: Mapping[str, fx.Node]) -> None:
        """The sums are formed, then LoRA."""
        out, into = site.features
        a = builder.call("aten.mm", factors["nola_alpha"], factors["nola_A_bases"])
        b = builder.call("aten.mm", builder.scaled(factors["nola_beta"], self.scale), factors["nola_B_bases"])
        hidden = builder.linear(site.x, builder.call("aten.view", a, [self.rank, into]))
        branch = builder.linear(hidden, builder.call("aten.view", b, [out, self.rank]))
        builder.adapt(site.node, builder.plus(site.node, branch))

    def merged(self, site: Site, dense: Dense, factors: Mapping[str, torch.Tensor]) -> Dense:
        """``W + s B A``."""
        a = (factors["nola_alpha"] @ factors["nola_A_bases"]).view(self.rank, -1)
        b = (factors["nola_beta"] @ factors["nola_B_bases"]).view(-1, self.rank)
        return Dense(dense.weight + self.scale * b @ a, dense.bias)


@functools.lru_cache(maxsize=2)
def _bases(seed: int, side: str, count: int, rows: int, columns: int) -> torch.Tensor:
    """``[k, rows · columns]``; they depend on the seed and their shape alone."""
    draw = Draw(seed, f"{side}{rows}x{columns}")
    return draw.uniform(count, rows * columns, bound=columns**-0.5)
