"""KronA^B and KronA^B_res: a Kronecker product beside a whole feed-forward block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from graphwright.ir.errors import InputError
from graphwright.ir.pattern import Refusal
from graphwright.ir.program import Program
from graphwright.passes.adapters.base import Draw, Factor
from graphwright.passes.adapters.blocks import block_sites
from graphwright.passes.adapters.builder import Builder
from graphwright.passes.adapters.kinds.krona import KronA
from graphwright.passes.adapters.sites import Site
from graphwright.passes.selection import Predicate


@dataclass(frozen=True)
class KronABlock(KronA):
    """``y = FFN(x) + s · x (A ⊗ B)ᵀ``, KronA^B, and with ``+ s_res · x``, KronA^B_res (Edalati et al. 2022, §3.2).

    x is what the block's first linears read (after the norm, where one is before them), ``FFN(x)`` the value of its
    last linear, before dropout and residual sum. Blocks are found by what they compute, see
    :mod:`graphwright.passes.adapters.blocks`; ``where=`` selects by their last linear.

    Trains ``a1 a2 + b1 b2`` numbers a block, and as many as the block is wide for each bias, and one with
    ``residual``. ``A`` starts Kaiming-uniform, ``B`` and biases at 0, ``s_res`` at 1: so KronA^B_res changes the model
    from the start.

    Attributes:
        a: ``(a1, a2)``, see :class:`KronA`.
        scale: s; the paper has 16, on some tasks 4.
        biases: 0; 1: ``s · (x (A ⊗ B)ᵀ + c)``; 2: ``s · ((x + b) (A ⊗ B)ᵀ + c)``.
        residual: KronA^B_res, with the trained ``s_res · x``.
    """

    kind: ClassVar[str] = "krona-block"
    unmergeable: ClassVar[str | None] = (
        "the block it lies beside is not linear, so none of its weights can take a product with its input in"
    )

    scale: float = 16.0
    biases: int = 0
    residual: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.biases not in (0, 1, 2) or isinstance(self.biases, bool):
            raise InputError(f"must be 0, 1 or 2, not {self.biases!r}", where=f"{self.kind}: biases")

    def starts_as_identity(self) -> bool:
        """Not with ``residual``, whose factor starts at 1."""
        return not self.residual

    def sites(self, program: Program, selected: Predicate, *, head: bool) -> Iterator[Site | Refusal]:
        """Feed-forward blocks."""
        return block_sites(program, selected)

    def factors(self, site: Site, draw: Draw) -> dict[str, Factor]:
        """``krona_A [a1, a2]``, ``krona_B [b1, b2]``, ``krona_c [out]``, ``krona_b [in]``, ``krona_res [1]``."""
        out, into = site.features
        found = super().factors(site, draw)
        if self.biases >= 1:
            found["krona_c"] = Factor(torch.zeros(out, dtype=site.dtype))
        if self.biases == 2:
            found["krona_b"] = Factor(torch.zeros(into, dtype=site.dtype))
        if self.residual:
            found["krona_res"] = Factor(torch.ones(1, dtype=site.dtype))
        return found

    def build(self, builder: Builder, site: Site, factors: Mapping[str, fx.Node]) -> None:
        """The product is one operator; the block does not wait for it."""
        x = builder.plus(site.x, factors["krona_b"]) if self.biases == 2 else site.x
        if self.biases == 0:
            branch = builder.call("graphwright.kron_linear", x, factors["krona_A"], factors["krona_B"], self.scale)
        else:
            product = builder.call("graphwright.kron_linear", x, factors["krona_A"], factors["krona_B"])
            branch = builder.scaled(builder.plus(product, factors["krona_c"]), self.scale)
        adapted = builder.plus(site.node, branch)
        if self.residual:
            adapted = builder.plus(adapted, builder.call("aten.mul.Tensor", site.x, factors["krona_res"]))
        builder.adapt(site.node, adapted)
