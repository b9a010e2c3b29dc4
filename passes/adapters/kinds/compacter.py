"""Compacter: a bottleneck behind a layer, whose projections are sums of Kronecker products."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from graphwright.ir.errors import InputError
from graphwright.passes.adapters.base import AdapterKind, Draw, Factor, whole
from graphwright.passes.adapters.builder import Builder
from graphwright.passes.adapters.sites import Site

_ACTIVATIONS = ("gelu", "relu", "silu")


@dataclass(frozen=True)
class Compacter(AdapterKind):
    """``y' = y + U f(D y + c) + e``, ``D = Σᵢ Aᵢ ⊗ (sᵢ tᵢ)``, ``U`` likewise (Karimi Mahabadi et al. 2021).

    ``y [out]`` is what a linear gives: put it at the last linear of attention and feed-forward, as the paper does. The
    ``Aᵢ [n, n]`` are shared by both projections of all layers; ``sᵢ`` and ``tᵢ`` are of low rank r, for ``D``
    ``[m / n, r]`` and ``[r, out / n]``. Trains ``n³`` numbers in all and ``2 r (out + m) + out + m`` a layer.
    The ``t`` of ``U`` starts at 0, so a new one changes nothing; ``A`` is normal, ``s`` and the other ``t``
    Kaiming-uniform, the biases ``c``, ``e`` 0.

    Attributes:
        bottleneck: m; n divides it.
        n: the number of products; divides the outputs.
        rank: r.
        activation: f: ``gelu``, ``relu`` or ``silu``.
    """

    kind: ClassVar[str] = "compacter"
    unmergeable: ClassVar[str | None] = "there is a non-linearity between its two projections"

    bottleneck: int = 24
    n: int = 4
    rank: int = 1
    activation: str = "gelu"

    def __post_init__(self) -> None:
        for option in ("bottleneck", "n", "rank"):
            whole(self.kind, option, getattr(self, option))
        if self.activation not in _ACTIVATIONS:
            known = ", ".join(_ACTIVATIONS)
            raise InputError(f"must be one of {known}, not {self.activation!r}", where=f"{self.kind}: activation")
        if self.bottleneck % self.n:
            raise InputError(
                f"n={self.n} does not divide bottleneck={self.bottleneck}",
                where=self.kind,
                hint=f"give bottleneck={self.n * max(1, self.bottleneck // self.n)}",
            )

    def check(self, site: Site) -> str | None:
        """An n that does not divide the outputs is an error."""
        if site.features[0] % self.n:
            raise InputError(
                f"n={self.n} does not divide the {site.features[0]} outputs",
                where=f"{self.kind} at {site.path}",
                hint="give another n, or leave the module out with ignore=",
            )
        return None

    def factors(self, site: Site, draw: Draw) -> dict[str, Factor]:
        """``phm_A [n, n, n]`` of all; ``{down,up}_{s,t}`` ``[n, …, r]``, ``[n, r, …]``; ``{down,up}_bias``."""
        out, m, n, rank = site.features[0], self.bottleneck, self.n, self.rank
        common = Draw(draw.seed, f"{self.kind} {n}")  # the same wherever it is drawn first
        found = {
            "down_s": draw.uniform(n, m // n, rank, bound=rank**-0.5),
            "down_t": draw.uniform(n, rank, out // n, bound=(out // n) ** -0.5),
            "down_bias": torch.zeros(m),
            "up_s": draw.uniform(n, out // n, rank, bound=rank**-0.5),
            "up_t": torch.zeros(n, rank, m // n),
            "up_bias": torch.zeros(out),
        }
        shared = Factor(common.normal(n, n, n, std=n**-0.5).to(site.dtype), shared=f"phm_A_{n}")
        return {"phm_A": shared, **{key: Factor(value.to(site.dtype)) for key, value in found.items()}}

    def build(self, builder: Builder, site: Site, factors: Mapping[str, fx.Node]) -> None:
        """The two projections are formed, then a bottleneck."""
        out, m = site.features[0], self.bottleneck
        down = self._projection(builder, factors, "down", m, out)
        up = self._projection(builder, factors, "up", out, m)
        hidden = builder.call(f"aten.{self.activation}", builder.linear(site.node, down, factors["down_bias"]))
        builder.adapt(site.node, builder.plus(site.node, builder.linear(hidden, up, factors["up_bias"])))

    def _projection(
        self, builder: Builder, factors: Mapping[str, fx.Node], side: str, rows: int, columns: int
    ) -> fx.Node:
        """``Σᵢ Aᵢ ⊗ (sᵢ tᵢ)``: entries ``[a, c, b, d]`` of all pairs, put in order."""
        n = self.n
        thin = builder.call("aten.bmm", factors[f"{side}_s"], factors[f"{side}_t"])
        flat = builder.call("aten.view", thin, [n, rows * columns // n**2])
        left = builder.call("aten.t", builder.call("aten.view", factors["phm_A"], [n, n * n]))
        pairs = builder.call("aten.view", builder.call("aten.mm", left, flat), [n, n, rows // n, columns // n])
        return builder.call("aten.reshape", builder.call("aten.permute", pairs, [0, 2, 1, 3]), [rows, columns])
