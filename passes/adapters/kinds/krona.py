"""KronA: a Kronecker product beside a linear."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from graphwright.ir.errors import InputError
from graphwright.passes.adapters.base import AdapterKind, Dense, Draw, Factor, finite, whole
from graphwright.passes.adapters.builder import Builder
from graphwright.passes.adapters.sites import Site


def kronecker_shapes(out: int, into: int) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Every pair of shapes ``A [a1, a2]``, ``B [b1, b2]`` with ``a1 b1 = out`` and ``a2 b2 = into``.

    Returns:
        by how many numbers they hold, fewest first; of those that hold as many, by the rank that the product can have,
        greatest first (a row times a column has 1), then by work.
    """
    found = [((a1, a2), (out // a1, into // a2)) for a1 in _divisors(out) for a2 in _divisors(into)]
    return sorted(found, key=lambda pair: (_numbers(pair), -_most_rank(pair), _work(pair), pair))


@dataclass(frozen=True)
class KronA(AdapterKind):
    """``y = x Wᵀ + s · x (A ⊗ B)ᵀ`` with ``A [a1, a2]``, ``B [b1, b2]`` (Edalati et al. 2022, "KronA").

    Trains ``a1 a2 + b1 b2`` numbers a linear. ``A`` starts Kaiming-uniform, ``B`` at 0. The product is never formed
    (:func:`graphwright.ir.ops.kronecker.kron_linear`), except to be merged.

    Attributes:
        a: ``(a1, a2)``; ``a1`` divides the outputs, ``a2`` the inputs. ``None``: the fewest numbers in all, see
            :func:`kronecker_shapes`.
        scale: s.
    """

    kind: ClassVar[str] = "krona"

    a: tuple[int, int] | None = None
    scale: float = 1.0

    def __post_init__(self) -> None:
        finite(self.kind, "scale", self.scale)
        if self.a is None:
            return
        if not isinstance(self.a, tuple | list) or len(self.a) != 2:
            raise InputError(f"must be two sizes, not {self.a!r}", where=f"{self.kind}: a")
        for size in self.a:
            whole(self.kind, "a", size)
        object.__setattr__(self, "a", tuple(self.a))

    def check(self, site: Site) -> str | None:
        """Shapes that do not divide the weight's are an error."""
        self.shapes(site)
        return None

    def shapes(self, site: Site) -> tuple[tuple[int, int], tuple[int, int]]:
        """The shapes of ``A`` and ``B`` at a site.

        Raises:
            InputError: ``a`` does not divide the weight's shape.
        """
        out, into = site.features
        if self.a is None:
            return kronecker_shapes(out, into)[0]
        if out % self.a[0] or into % self.a[1]:
            wanted = self.a
            near = min(
                kronecker_shapes(out, into), key=lambda pair: abs(pair[0][0] - wanted[0]) + abs(pair[0][1] - wanted[1])
            )
            raise InputError(
                f"a={self.a} does not divide the weight [{out}, {into}]",
                where=f"{self.kind} at {site.path}",
                hint=f"the nearest that does is a={near[0]}; kronecker_shapes({out}, {into}) lists all",
            )
        return self.a, (out // self.a[0], into // self.a[1])

    def factors(self, site: Site, draw: Draw) -> dict[str, Factor]:
        """``krona_A [a1, a2]`` and ``krona_B [b1, b2]``."""
        a, b = self.shapes(site)
        return {
            "krona_A": Factor(draw.kaiming_uniform(*a).to(site.dtype)),
            "krona_B": Factor(torch.zeros(b, dtype=site.dtype)),
        }

    def build(self, builder: Builder, site: Site, factors: Mapping[str, fx.Node]) -> None:
        """One operator and a sum."""
        branch = builder.call("graphwright.kron_linear", site.x, factors["krona_A"], factors["krona_B"], self.scale)
        builder.adapt(site.node, builder.plus(site.node, branch))

    def merged(self, site: Site, dense: Dense, factors: Mapping[str, torch.Tensor]) -> Dense:
        """``W + s A ⊗ B``."""
        return Dense(dense.weight + self.scale * torch.kron(factors["krona_A"], factors["krona_B"]), dense.bias)


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _numbers(pair: tuple[tuple[int, int], tuple[int, int]]) -> int:
    (a1, a2), (b1, b2) = pair
    return a1 * a2 + b1 * b2


def _most_rank(pair: tuple[tuple[int, int], tuple[int, int]]) -> int:
    """The rank of a Kronecker product is the product of the ranks."""
    a, b = pair
    return min(a) * min(b)


def _work(pair: tuple[tuple[int, int], tuple[int, int]]) -> int:
    from graphwright.ir.ops.kronecker import products

    return min(products(*pair, first_b=True), products(*pair, first_b=False))
