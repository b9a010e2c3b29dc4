"""LoRA: a product of two thin matrices beside a layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from graphwright.ir.errors import InputError
from graphwright.ir.pattern import Refusal
from graphwright.ir.program import Program
from graphwright.passes.adapters.base import AdapterKind, Dense, Draw, Factor, check_rank, finite, whole
from graphwright.passes.adapters.builder import Builder
from graphwright.passes.adapters.layers import check_ops, layer_sites
from graphwright.passes.adapters.sites import Site
from graphwright.passes.selection import Predicate


def scaling(rank: int, alpha: float | None, *, rank_stabilized: bool = False) -> float:
    """``alpha / rank``, or ``alpha / √rank`` (Kalajdzievski 2023, "rsLoRA"); 1 without an alpha."""
    if alpha is None:
        return 1.0
    return alpha / (rank**0.5 if rank_stabilized else rank)


@dataclass(frozen=True)
class LoRA(AdapterKind):
    """``y = x Wᵀ + s · (x Aᵀ) Bᵀ`` with ``A [r, in]``, ``B [out, r]`` (Hu et al. 2021, eq. 3).

    Trains ``r (in + out)`` numbers a linear. ``A`` starts Kaiming-uniform, ``B`` at 0.

    An embedding ``E [rows, dim]`` becomes ``E + s Aᵀ Bᵀ`` with ``A [r, rows]`` at 0 and ``B [dim, r]`` normal, as the
    authors' code has it: ``r (rows + dim)`` numbers. A convolution with kernel ``k`` gets one with ``A [r, in, k…]``
    and a pointwise one with ``B [out, r, 1…]`` behind it: ``r (in · ∏k + out)`` numbers; of one with groups the product
    would have none, so it is refused.

    Attributes:
        rank: r.
        alpha: the scale is ``alpha / rank``; ``None`` for a scale of 1.
        rank_stabilized: the scale is ``alpha / √rank`` (Kalajdzievski 2023, "rsLoRA").
        ops: of the layers it goes to: ``linear``, ``embedding``, ``conv``.
        bias: of ``B``, ``[out]`` from 0 on: ``y + s · (… + b)``, as PEFT's ``lora_bias`` has it; not at embeddings.
    """

    kind: ClassVar[str] = "lora"

    rank: int = 8
    alpha: float | None = None
    rank_stabilized: bool = False
    ops: tuple[str, ...] = ("linear",)
    bias: bool = False

    def __post_init__(self) -> None:
        whole(self.kind, "rank", self.rank)
        if self.alpha is not None:
            finite(self.kind, "alpha", self.alpha)
        object.__setattr__(self, "ops", check_ops(self.kind, self.ops))
        if not isinstance(self.bias, bool):
            raise InputError(f"must be True or False, not {self.bias!r}", where=f"{self.kind}: bias")

    @property
    def scale(self) -> float:
        """The factor of the branch."""
        return scaling(self.rank, self.alpha, rank_stabilized=self.rank_stabilized)

    def sites(self, program: Program, selected: Predicate, *, head: bool) -> Iterator[Site | Refusal]:
        """Layers of the ``ops``."""
        return layer_sites(program, selected, self.ops, kind=self.kind, head=head)

    def check(self, site: Site) -> str | None:
        """A rank above the weight's smaller side is an error."""
        if site.groups > 1:
            return f"a convolution with {site.groups} groups has no product of two thin ones"
        if self.bias and site.op == "embedding":
            return "what an embedding looks up has no bias"
        check_rank(self.kind, self.rank, site)
        return None

    def factors(self, site: Site, draw: Draw) -> dict[str, Factor]:
        """``lora_A [r, in]`` and ``lora_B [out, r]``; ``lora_bias [out]`` where it has one."""
        (out, into), ones = site.features, (1,) * len(site.kernel)
        if site.op == "embedding":
            a, b = torch.zeros(self.rank, into), draw.normal(out, self.rank)
        else:
            a, b = draw.kaiming_uniform(self.rank, into, *site.kernel), torch.zeros(out, self.rank, *ones)
        made = {"lora_A": a, "lora_B": b, **({"lora_bias": torch.zeros(out)} if self.bias else {})}
        return {name: Factor(value.to(site.dtype)) for name, value in made.items()}

    def build(self, builder: Builder, site: Site, factors: Mapping[str, fx.Node]) -> None:
        """The scale goes where the numbers are fewest."""
        a, b, bias = factors["lora_A"], factors["lora_B"], factors.get("lora_bias")
        hidden = builder.through(builder.call("aten.t", a) if site.op == "embedding" else a)
        if bias is None:
            hidden = builder.scaled(hidden, self.scale)
        branch = builder.pointwise(hidden, b, bias) if site.op == "conv" else builder.linear(hidden, b, bias)
        if bias is not None:
            branch = builder.scaled(branch, self.scale)
        builder.adapt(site.node, builder.plus(site.node, branch))

    def merged(self, site: Site, dense: Dense, factors: Mapping[str, torch.Tensor]) -> Dense:
        """``W + s B A``."""
        product = self.scale * factors["lora_B"].flatten(1) @ factors["lora_A"].flatten(1)
        product = product.t() if site.op == "embedding" else product.view_as(dense.weight)
        bias = dense.bias
        if "lora_bias" in factors:
            added = self.scale * factors["lora_bias"]
            bias = added if bias is None else bias + added
        return Dense(dense.weight + product, bias)
