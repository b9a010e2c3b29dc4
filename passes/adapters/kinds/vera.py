"""VeRA: random matrices that all layers share, and two trained vectors for each."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from graphwright.ir.errors import InputError
from graphwright.passes.adapters.base import AdapterKind, Dense, Draw, Factor, finite, whole
from graphwright.passes.adapters.builder import Builder
from graphwright.passes.adapters.sites import Site


@dataclass(frozen=True)
class VeRA(AdapterKind):
    """``y = x Wᵀ + b ⊙ (B (d ⊙ (A x)))`` with frozen random ``A``, ``B`` (Kopiczko et al. 2024, eq. 2).

    All linears share ``A [r, in]`` and ``B [out, r]`` of the widest sides among them and take the first columns and
    rows that they need. Trains ``r + out`` numbers a linear: ``d [r]`` starts at ``initial``, ``b [out]`` at 0.

    Attributes:
        rank: r; large ones cost no trained numbers to speak of.
        initial: what ``d`` starts at.
        seed: of ``A`` and ``B``, which are Kaiming-uniform; the same seed and sizes give the same as in Hugging Face
            PEFT (``projection_prng_key``).
        size: ``(out, in)`` of the shared matrices; ``None``: the widest sides of the places it goes to.
        save_projection: save ``A`` and ``B`` too. Without, a file holds the vectors, and the seed gives the matrices;
            PyTorch promises the same random numbers on the same release and machine only.
    """

    kind: ClassVar[str] = "vera"

    rank: int = 256
    initial: float = 0.1
    seed: int = 0
    size: tuple[int, int] | None = None
    save_projection: bool = True

    def __post_init__(self) -> None:
        whole(self.kind, "rank", self.rank)
        whole(self.kind, "seed", self.seed, least=0)
        finite(self.kind, "initial", self.initial)
        if self.size is None:
            return
        if not isinstance(self.size, tuple | list) or len(self.size) != 2:
            raise InputError(f"must be two sizes, not {self.size!r}", where=f"{self.kind}: size")
        for each in self.size:
            whole(self.kind, "size", each)
        object.__setattr__(self, "size", tuple(self.size))

    def settled(self, sites: Sequence[Site]) -> AdapterKind:
        """With the widest sides as the size."""
        if self.size is not None:
            return self
        return dataclasses.replace(self, size=(max(s.features[0] for s in sites), max(s.features[1] for s in sites)))

    def drawn(self) -> frozenset[str]:
        """The matrices, unless they are saved."""
        return frozenset() if self.save_projection else frozenset({"vera_A", "vera_B"})

    def factors(self, site: Site, draw: Draw) -> dict[str, Factor]:
        """``vera_lambda_d [r]``, ``vera_lambda_b [out]``, and the shared ``vera_A``, ``vera_B``.

        Raises:
            InputError: the site is wider than the size.
        """
        out, into = self.size or site.features
        if site.features[0] > out or site.features[1] > into:
            raise InputError(
                f"its weight {list(site.features)} is wider than size={[out, into]}",
                where=f"{self.kind} at {site.path}",
                hint="give a size that holds all of them, or none",
            )
        a, b = _projections(self.rank, out, into, self.seed)
        return {
            "vera_lambda_d": Factor(torch.full((self.rank,), float(self.initial), dtype=site.dtype)),
            "vera_lambda_b": Factor(torch.zeros(site.features[0], dtype=site.dtype)),
            "vera_A": Factor(a.to(site.dtype), trained=False, shared="vera_A"),
            "vera_B": Factor(b.to(site.dtype), trained=False, shared="vera_B"),
        }

    def build(self, builder: Builder, site: Site, factors: Mapping[str, fx.Node]) -> None:
        """Two linears on parts of the matrices, each followed by a product with a vector."""
        a, b = factors["vera_A"], factors["vera_B"]
        if a.meta["val"].shape[1] != site.features[1]:
            a = builder.call("aten.slice.Tensor", a, 1, 0, site.features[1])
        if b.meta["val"].shape[0] != site.features[0]:
            b = builder.call("aten.slice.Tensor", b, 0, 0, site.features[0])
        hidden = builder.call("aten.mul.Tensor", builder.linear(site.x, a), factors["vera_lambda_d"])
        branch = builder.call("aten.mul.Tensor", builder.linear(hidden, b), factors["vera_lambda_b"])
        builder.adapt(site.node, builder.plus(site.node, branch))

    def merged(self, site: Site, dense: Dense, factors: Mapping[str, torch.Tensor]) -> Dense:
        """``W + diag(b) B diag(d) A``."""
        out, into = site.features
        a, b = factors["vera_A"][:, :into], factors["vera_B"][:out]
        outer = factors["vera_lambda_b"].unsqueeze(1) * b
        return Dense(dense.weight + outer @ (factors["vera_lambda_d"].unsqueeze(1) * a), dense.bias)


@functools.lru_cache(maxsize=1)
def _projections(rank: int, out: int, into: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``A [r, in]`` and ``B [out, r]``, drawn in this order: Kaiming-uniform with the gain of a ReLU."""
    generator = torch.Generator().manual_seed(seed)
    bounds = [3.0**0.5 * (2.0**0.5 / fan_in**0.5) for fan_in in (into, rank)]
    a = torch.empty(rank, into).uniform_(-bounds[0], bounds[0], generator=generator)
    return a, torch.empty(out, rank).uniform_(-bounds[1], bounds[1], generator=generator)
