"""DoRA: LoRA on the direction of a weight's rows, with their lengths trained beside it."""

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
from graphwright.passes.adapters.kinds.lora import LoRA, scaling
from graphwright.passes.adapters.layers import check_ops, layer_sites
from graphwright.passes.adapters.sites import Site
from graphwright.passes.selection import Predicate


@dataclass(frozen=True)
class DoRA(AdapterKind):
    """``y = x (m ⊙ V / ‖V‖)ᵀ + b`` with ``V = W + s B A`` and the norm of each row (Liu et al. 2024, eq. 5).

    The norm gets no gradient, as the authors have it (section 4.3). Trains ``r (in + out) + out`` numbers a linear:
    ``A [r, in]`` starts Kaiming-uniform, ``B [out, r]`` at 0, ``m [out]`` at the rows' norms. It reads the weight, so
    it needs one in floating point.

    At an embedding the rows are those of its transpose, one length for each feature, and at a convolution a row is all
    that makes one output channel; ``A`` and ``B`` are LoRA's there. It does not go to convolutions with groups.

    Attributes:
        rank: r.
        alpha: the scale is ``alpha / rank``; ``None`` for a scale of 1.
        rank_stabilized: the scale is ``alpha / √rank``.
        ops: of the layers it goes to: ``linear``, ``embedding``, ``conv``.
    """

    kind: ClassVar[str] = "dora"
    stored: ClassVar[bool] = True

    rank: int = 8
    alpha: float | None = None
    rank_stabilized: bool = False
    ops: tuple[str, ...] = ("linear",)

    def __post_init__(self) -> None:
        whole(self.kind, "rank", self.rank)
        if self.alpha is not None:
            finite(self.kind, "alpha", self.alpha)
        object.__setattr__(self, "ops", check_ops(self.kind, self.ops))

    @property
    def scale(self) -> float:
        """The factor of ``B A``."""
        return scaling(self.rank, self.alpha, rank_stabilized=self.rank_stabilized)

    def sites(self, program: Program, selected: Predicate, *, head: bool) -> Iterator[Site | Refusal]:
        """Layers of the ``ops``."""
        return layer_sites(program, selected, self.ops, kind=self.kind, head=head)

    def check(self, site: Site) -> str | None:
        """A packed weight has no norm to read; a rank above the weight's smaller side is an error."""
        if site.packed:
            return "dora reads the weight, which must be in floating point; it is packed (insert it before quantising)"
        return LoRA(self.rank, ops=self.ops).check(site)

    def factors(self, site: Site, draw: Draw) -> dict[str, Factor]:
        """LoRA's ``lora_A`` and ``lora_B``, and ``magnitude [out]``."""
        assert site.program is not None
        assert site.weight is not None
        stored = site.program.tensor(site.weight).detach()
        rows = stored.t() if site.transposed or site.op == "embedding" else stored.flatten(1)
        lengths = torch.linalg.vector_norm(rows, 2, 1).to(site.dtype)
        return {**LoRA(self.rank, ops=self.ops).factors(site, draw), "magnitude": Factor(lengths)}

    def like(self, site: Site) -> dict[str, Factor]:
        """A saved one has its lengths; no norm is computed."""
        lengths = torch.empty(site.features[0], dtype=site.dtype)
        return {**LoRA(self.rank, ops=self.ops).like(site), "magnitude": Factor(lengths)}

    def build(self, builder: Builder, site: Site, factors: Mapping[str, fx.Node]) -> None:
        """``y + (m / ‖V‖ - 1) (y - b) + m / ‖V‖ · s (x Aᵀ) Bᵀ``: the layer runs as it is, and V x is never formed."""
        assert site.weight is not None
        a, b = factors["lora_A"], factors["lora_B"]
        weight = builder.call("aten.t", site.weight) if site.transposed or site.op == "embedding" else site.weight
        product = builder.call("aten.mm", *(self._flat(builder, site, factor) for factor in (b, a)))
        if site.op == "conv":
            product = builder.call("aten.view", product, list(site.weight.meta["val"].shape))
        delta, ones = builder.scaled(product, self.scale), [1] * len(site.kernel)
        axes = list(range(1, 2 + len(site.kernel)))
        norm = builder.call("aten.linalg_vector_norm", builder.plus(weight, delta), 2, axes)
        ratio = builder.call("aten.div.Tensor", factors["magnitude"], builder.call("aten.detach", norm))
        bias = site.bias
        if ones:
            ratio = builder.call("aten.view", ratio, [-1, *ones])
            bias = None if bias is None else builder.call("aten.view", bias, [-1, *ones])
        bare = site.node if bias is None else builder.call("aten.sub.Tensor", site.node, bias)
        stretched = builder.call("aten.mul.Tensor", bare, builder.call("aten.sub.Tensor", ratio, 1.0))
        hidden = builder.scaled(builder.through(builder.call("aten.t", a) if site.op == "embedding" else a), self.scale)
        branch = builder.pointwise(hidden, b) if site.op == "conv" else builder.linear(hidden, b)
        turned = builder.call("aten.mul.Tensor", branch, ratio)
        builder.adapt(site.node, builder.plus(builder.plus(site.node, stretched), turned))

    def merged(self, site: Site, dense: Dense, factors: Mapping[str, torch.Tensor]) -> Dense:
        """``m ⊙ V / ‖V‖``."""
        product = self.scale * factors["lora_B"].flatten(1) @ factors["lora_A"].flatten(1)
        if site.op == "embedding":
            direction = dense.weight + product.t()
            return Dense(direction * (factors["magnitude"] / torch.linalg.vector_norm(direction, 2, 0)), dense.bias)
        direction = dense.weight + product.view_as(dense.weight)
        ratio = factors["magnitude"] / torch.linalg.vector_norm(direction.flatten(1), 2, 1)
        return Dense(direction * ratio.view(-1, *(1,) * (direction.dim() - 1)), dense.bias)

    @staticmethod
    def _flat(builder: Builder, site: Site, factor: fx.Node) -> fx.Node:
        """A factor as a matrix."""
        return builder.call("aten.flatten.using_ints", factor, 1, -1) if site.op == "conv" else factor
