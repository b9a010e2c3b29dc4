"""The ways in which means, squares and roots are written, as patterns; shared by the norms."""

from __future__ import annotations

import math

from graphwright.ir.pattern import Match, Matcher, const, either, op


def squared(x: Matcher) -> Matcher:
    """``x²``."""
    return either(op("aten.pow.Tensor_Scalar", x, 2), op("aten.mul.Tensor", x, x), op("aten.square", x))


def root_of(x: Matcher) -> Matcher:
    """``√x``."""
    return either(op("aten.sqrt", x), op("aten.pow.Tensor_Scalar", x, 0.5))


def inverse_root_of(x: Matcher) -> Matcher:
    """``1 / √x``."""
    return either(op("aten.rsqrt", x), op("aten.pow.Tensor_Scalar", x, -0.5), op("aten.reciprocal", root_of(x)))


def divided_by_root(x: Matcher, radicand: Matcher) -> list[Matcher]:
    """``x / √radicand``."""
    return [
        op("aten.mul.Tensor", x, inverse_root_of(radicand), commutative=True),
        op("aten.div.Tensor", x, root_of(radicand)),
    ]


def mean_of(x: Matcher, label: str) -> Matcher:
    """The mean over axes that are kept; binds ``<label>_dims``, and of a sum ``<label>_count`` or ``<label>_share``."""
    dims = const(f"{label}_dims", list, tuple, int)
    total = op("aten.sum.dim_IntList", x, dims, keepdim=True)
    return either(
        op("aten.mean.dim", x, dims, keepdim=True),
        op("aten.div.Tensor", total, const(f"{label}_count")),
        op("aten.mul.Tensor", total, const(f"{label}_share")),
    )


def wrong_count(match: Match, label: str, sizes: tuple[int, ...]) -> str | None:
    """Why a sum that was divided by a number is not a mean."""
    count = math.prod(sizes)
    if match.get(f"{label}_count", count) != count:
        return f"the sum over {count} values is divided by {match[f'{label}_count']}"
    if not math.isclose(match.get(f"{label}_share", 1 / count) * count, 1.0, rel_tol=1e-12):
        return f"the sum over {count} values is multiplied by {match[f'{label}_share']}"
    return None


def epsilon_reason(match: Match) -> str | None:
    """Why there is no epsilon that the operator could take over."""
    if "eps" in match.bound:
        return None
    if "outside" in match.bound:
        return "epsilon is added to the root, not under it"
    return "there is no epsilon under the root"
