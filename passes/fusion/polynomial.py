"""Arithmetic expressions as polynomials, so that the order in which they were written does not matter."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx

from graphwright.ir.arguments import argument
from graphwright.ir.names import op_name

# exponents of the atoms -> coefficient
Polynomial = dict[tuple[int, ...], float]

_HIGHEST_DEGREE = 4


class Expander:
    """Writes nodes as polynomials in a few atoms.

    Args:
        atoms: the nodes that are the variables.

    Attributes:
        inner: the nodes that were expanded, in the order in which they were met.
    """

    def __init__(self, atoms: Sequence[fx.Node]) -> None:
        self.atoms = list(atoms)
        self.inner: list[fx.Node] = []

    def expand(self, value: Any) -> Polynomial | None:
        """The polynomial of a node or number; ``None`` when it is no polynomial in the atoms."""
        if isinstance(value, int | float) and not isinstance(value, bool):
            return {self._power(None): float(value)}
        if not isinstance(value, fx.Node):
            return None
        if value in self.atoms:
            return {self._power(value): 1.0}
        found = self._combine(value)
        if found is not None:
            self.inner.append(value)
        return found

    def _power(self, atom: fx.Node | None) -> tuple[int, ...]:
        return tuple(int(other is atom) for other in self.atoms)

    def _combine(self, node: fx.Node) -> Polynomial | None:
        name = op_name(node)
        if name in ("aten.add.Tensor", "aten.sub.Tensor", "aten.rsub.Scalar"):
            return self._sum(node, name)
        if name == "aten.mul.Tensor":
            left, right = self.expand(node.args[0]), self.expand(node.args[1])
            return _product(left, right) if left is not None and right is not None else None
        if name == "aten.div.Tensor":
            left, divisor = self.expand(node.args[0]), node.args[1]
            return _scaled(left, 1.0 / divisor) if isinstance(divisor, int | float) and divisor else None
        if name == "aten.neg":
            return _scaled(self.expand(node.args[0]), -1.0)
        if name in ("aten.pow.Tensor_Scalar", "aten.square"):
            exponent = 2 if name == "aten.square" else node.args[1]
            base = self.expand(node.args[0])
            if base is None or exponent not in (2, 3):
                return None
            squared = _product(base, base)
            return squared if exponent == 2 or squared is None else _product(squared, base)
        return None

    def _sum(self, node: fx.Node, name: str) -> Polynomial | None:
        alpha = argument(node, "alpha")
        left, right = self.expand(node.args[0]), self.expand(node.args[1])
        if left is None or right is None or isinstance(alpha, fx.Node):
            return None
        if name == "aten.rsub.Scalar":
            left, right = right, left
        sign = 1.0 if name == "aten.add.Tensor" else -1.0
        weights = (1.0, sign * alpha) if name != "aten.rsub.Scalar" else (1.0, -float(alpha))
        total: Polynomial = {}
        for part, weight in zip((left, right), weights, strict=True):
            for power, coefficient in part.items():
                total[power] = total.get(power, 0.0) + weight * coefficient
        return total


def _product(left: Polynomial, right: Polynomial) -> Polynomial | None:
    total: Polynomial = {}
    for first, a in left.items():
        for second, b in right.items():
            power = tuple(i + j for i, j in zip(first, second, strict=True))
            if sum(power) > _HIGHEST_DEGREE:
                return None
            total[power] = total.get(power, 0.0) + a * b
    return total


def _scaled(polynomial: Polynomial | None, factor: float) -> Polynomial | None:
    return None if polynomial is None else {power: value * factor for power, value in polynomial.items()}


def is_close(found: Mapping[tuple[int, ...], float], wanted: Mapping[tuple[int, ...], float], tolerance: float) -> bool:
    """Whether two polynomials have the same terms, with coefficients equal to a relative tolerance."""
    return found.keys() == wanted.keys() and all(
        math.isclose(found[power], wanted[power], rel_tol=tolerance) for power in wanted
    )
