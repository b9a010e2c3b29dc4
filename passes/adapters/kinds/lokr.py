"""LoKr: a Kronecker product beside a layer, one of whose factors may be of low rank."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from graphwright.ir.pattern import Refusal
from graphwright.ir.program import Program
from graphwright.passes.adapters.base import AdapterKind, Dense, Draw, Factor, finite, whole
from graphwright.passes.adapters.builder import Builder
from graphwright.passes.adapters.kinds.lora import scaling
from graphwright.passes.adapters.layers import check_ops, layer_sites
from graphwright.passes.adapters.sites import Site
from graphwright.passes.selection import Predicate


@dataclass(frozen=True)
class LoKr(AdapterKind):
    """``y = x Wᵀ + s · x (C ⊗ D)ᵀ`` with ``C [a, c]``, ``D [b, d]``, ``a b = out``, ``c d = in`` (Yeh et al. 2023).

    ``D = D₁ D₂`` of rank r where r is below half its larger side, and ``C`` likewise with ``decompose_both``; else they
    are whole. Trains ``a c + r (b + d)`` numbers a linear, with both decomposed ``r (a + c) + r (b + d)``, with none
    ``a c + b d``. The last factor of ``D`` starts at 0, as in LyCORIS; the others Kaiming-uniform.

    A convolution's kernel belongs to ``D [b, d, k…]``, whose columns then count ``d · ∏k``.

    Attributes:
        rank: r.
        alpha: the scale is ``alpha / rank``; ``None`` for a scale of 1.
        factor: wanted ``a`` and ``c``; ``-1``: the nearest to the square root. What does not divide a side becomes the
            largest number up to it that does.
        decompose_both: ``C`` too.
        ops: of the layers it goes to: ``linear``, ``conv``.
    """

    kind: ClassVar[str] = "lokr"

    rank: int = 8
    alpha: float | None = None
    factor: int = -1
    decompose_both: bool = False
    ops: tuple[str, ...] = ("linear",)

    def __post_init__(self) -> None:
        whole(self.kind, "rank", self.rank)
        if self.factor != -1:
            whole(self.kind, "factor", self.factor)
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

    def shapes(self, site: Site) -> tuple[tuple[int, int], tuple[int, int]]:
        """``(a, c)`` and ``(b, d)`` at a site."""
        (a, b), (c, d) = split(site.features[0], self.factor), split(site.features[1] // site.groups, self.factor)
        return (a, c), (b, d)

    def factors(self, site: Site, draw: Draw) -> dict[str, Factor]:
        """``lokr_w1``, or ``lokr_w1_a [a, r]`` and ``lokr_w1_b [r, c]``; the same of ``lokr_w2``."""
        (a, c), (b, d) = self.shapes(site)
        found: dict[str, torch.Tensor] = {}
        if self.decompose_both and self.rank < max(a, c) / 2:
            found["lokr_w1_a"] = draw.kaiming_uniform(a, self.rank)
            found["lokr_w1_b"] = draw.kaiming_uniform(self.rank, c)
        else:
            found["lokr_w1"] = draw.kaiming_uniform(a, c)
        places = torch.Size(site.kernel).numel()
        if self.rank < max(b, d) / 2:
            found["lokr_w2_a"] = draw.kaiming_uniform(b, self.rank)
            found["lokr_w2_b"] = torch.zeros(self.rank, d * places)
        else:
            found["lokr_w2"] = torch.zeros(b, d, *site.kernel)
        return {key: Factor(value.to(site.dtype)) for key, value in found.items()}

    def build(self, builder: Builder, site: Site, factors: Mapping[str, fx.Node]) -> None:
        """The product is formed for a convolution only."""
        w1, w2 = (
            factors.get(key) or builder.call("aten.mm", factors[f"{key}_a"], factors[f"{key}_b"])
            for key in ("lokr_w1", "lokr_w2")
        )
        if site.op == "linear":
            branch = builder.call("graphwright.kron_linear", site.x, w1, w2, self.scale)
        else:
            (a, c), (b, d) = self.shapes(site)
            whole_ = builder.call("aten.view", w2, [1, b, 1, d, *site.kernel])
            pairs = builder.call("aten.mul.Tensor", builder.call("aten.view", w1, [a, 1, c, 1, *ones(site)]), whole_)
            weight = builder.call("aten.reshape", builder.scaled(pairs, self.scale), [a * b, c * d, *site.kernel])
            branch = builder.through(weight)
        builder.adapt(site.node, builder.plus(site.node, branch))

    def merged(self, site: Site, dense: Dense, factors: Mapping[str, torch.Tensor]) -> Dense:
        """``W + s C ⊗ D``."""
        (a, c), (b, d) = self.shapes(site)
        w1, w2 = (
            factors[key] if key in factors else factors[f"{key}_a"] @ factors[f"{key}_b"]
            for key in ("lokr_w1", "lokr_w2")
        )
        product = torch.kron(w1.view(a, c, *ones(site)), w2.view(b, d, *site.kernel))
        return Dense(dense.weight + self.scale * product, dense.bias)


def split(size: int, factor: int) -> tuple[int, int]:
    """Two numbers whose product is ``size``, the first at most the second unless ``factor`` divides ``size``.

    Args:
        size: of one side of a weight.
        factor: the wanted first number; ``-1`` for the nearest to the square root.
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    limit = size if factor == -1 else factor
    small = max(each for each in range(1, int(size**0.5) + 1) if size % each == 0 and each <= limit)
    return small, size // small


def ones(site: Site) -> tuple[int, ...]:
    """Sizes of 1 in place of a convolution's kernel."""
    return (1,) * len(site.kernel)
