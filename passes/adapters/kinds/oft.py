"""OFT: the inputs of a layer rotated in blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from graphwright.passes.adapters.base import AdapterKind, Dense, Draw, Factor, whole
from graphwright.passes.adapters.builder import Builder
from graphwright.passes.adapters.kinds.ether import check_blocks
from graphwright.passes.adapters.sites import Site


@dataclass(frozen=True)
class OFT(AdapterKind):
    """``y = (x R) Wᵀ + b``, ``R = diag(R₁ … R_k)``, ``Rᵢ = (I - Sᵢ) (I + Sᵢ)⁻¹`` (Qiu et al. 2023, "OFT").

    ``Sᵢ [n, n]`` is skew-symmetric, so ``Rᵢ`` is orthogonal (Cayley). Trains what lies above its diagonal:
    ``k n (n - 1) / 2`` numbers a linear with ``k n = in``; they start at 0, where ``R`` is the identity.

    With ``terms`` there is no inverse: ``Rᵢ = I + 2 Sᵢ + … + 2 Sᵢʰ⁻¹ + Sᵢʰ``, the beginning of the Neumann series of
    ``(I + Sᵢ) (I - Sᵢ)⁻¹`` (Qiu et al. 2025, "OFTv2", Cayley-Neumann parameterisation) with its last term halved, as
    Hugging Face PEFT has it by default: ``h = max(terms - 1, 3)`` from three terms on. That is a rotation only
    as far as ``Sᵢ`` is small.

    Attributes:
        block: n; divides the inputs.
        terms: of the series, 2 or more; 0 for the exact rotation.
    """

    kind: ClassVar[str] = "oft"

    block: int = 32
    terms: int = 0

    def __post_init__(self) -> None:
        whole(self.kind, "block", self.block, least=2)
        if self.terms != 0:
            whole(self.kind, "terms", self.terms, least=2)

    def drawn(self) -> frozenset[str]:
        """Where the numbers stand in ``S``."""
        return frozenset({"oft_index"})

    def check(self, site: Site) -> str | None:
        """A block that does not divide the inputs is an error."""
        check_blocks(self.kind, site, "block", self.block, site.features[1])
        return None

    def factors(self, site: Site, draw: Draw) -> dict[str, Factor]:
        """``oft_R [k, n (n - 1) / 2]``, and the constant ``oft_index [n²]``: 0, the numbers, their negatives."""
        n = self.block
        count = n * (n - 1) // 2
        rows, columns = torch.triu_indices(n, n, 1)
        index = torch.zeros(n, n, dtype=torch.int64)
        index[rows, columns] = torch.arange(1, count + 1)
        index[columns, rows] = torch.arange(count + 1, 2 * count + 1)
        return {
            "oft_R": Factor(torch.zeros(site.features[1] // n, count, dtype=site.dtype)),
            "oft_index": Factor(index.flatten(), trained=False, shared=f"oft_index_{n}"),
        }

    def build(self, builder: Builder, site: Site, factors: Mapping[str, fx.Node]) -> None:
        """The blocks are made at every step; ``x R`` is one product."""
        n, numbers = self.block, factors["oft_R"]
        zero = builder.call("aten.mul.Tensor", builder.call("aten.slice.Tensor", numbers, 1, 0, 1), 0.0)
        row = builder.call("aten.cat", [zero, numbers, builder.call("aten.neg", numbers)], 1)
        picked = builder.call("aten.index_select", row, 1, factors["oft_index"])
        # Inverses are not computed in half precision.
        wide = torch.promote_types(site.dtype, torch.float32)
        skew = builder.cast(builder.call("aten.view", picked, [-1, n, n]), wide)
        eye = builder.call("aten.eye", n, dtype=wide)
        if self.terms:
            rotation = self._series(builder, eye, skew)
        else:
            inverse = builder.call("aten.linalg_inv", builder.call("aten.add.Tensor", eye, skew))
            rotation = builder.call("aten.matmul", builder.call("aten.sub.Tensor", eye, skew), inverse)
        rotation = builder.cast(rotation, site.dtype)
        blocks = builder.call("aten.unflatten.int", site.x, -1, [site.features[1] // n, 1, n])
        turned = builder.call("aten.matmul", blocks, rotation)
        builder.feed(site.node, site.input_name, builder.call("aten.flatten.using_ints", turned, -3, -1))

    def merged(self, site: Site, dense: Dense, factors: Mapping[str, torch.Tensor]) -> Dense:
        """``W Rᵀ``."""
        n, numbers = self.block, factors["oft_R"]
        skew = numbers.new_zeros(numbers.shape[0], n, n)
        rows, columns = torch.triu_indices(n, n, 1)
        skew[:, rows, columns] = numbers
        skew = skew - skew.mT
        eye = torch.eye(n, dtype=numbers.dtype)
        if self.terms:
            powers = [torch.linalg.matrix_power(skew, power) * factor for power, factor in self._factors()]
            rotation = eye + torch.stack(powers).sum(0)
        else:
            rotation = (eye - skew) @ torch.linalg.inv(eye + skew)
        return Dense(dense.weight @ torch.block_diag(*rotation).t(), dense.bias)

    def _factors(self) -> list[tuple[int, float]]:
        """Powers of ``S`` and their factors."""
        if self.terms == 2:
            return [(1, 2.0)]
        last = max(self.terms - 1, 3)
        return [*((power, 2.0) for power in range(1, last)), (last, 1.0)]

    def _series(self, builder: Builder, eye: fx.Node, skew: fx.Node) -> fx.Node:
        total, power = eye, skew
        for exponent, factor in self._factors():
            power = skew if exponent == 1 else builder.call("aten.matmul", power, skew)
            total = builder.call("aten.add.Tensor", total, builder.scaled(power, factor))
        return total
