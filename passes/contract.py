"""What a pass promises about the function it leaves behind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Exact:
    """The function stays the same.

    Attributes:
        bitwise: outputs are equal bit for bit in the native dtype (pure graph surgery). Otherwise operations may be
            regrouped: outputs may move by a small multiple of the original's own rounding error.
        tolerance: largest error of a replaced value, computed in float64 from the same inputs, relative to the value's
            root mean square. Loosen it only for passes that compute constants in the native dtype.
        stored: weights are computed anew and rounded to the dtype that they are stored in, so a value may also err by
            what that rounding makes of it.
    """

    bitwise: bool = False
    tolerance: float = 1e-9
    stored: bool = False
    kind: ClassVar[str] = "exact"


@dataclass(frozen=True)
class Approximate:
    """The function changes a little; the error is measured and reported, and held to a budget.

    Attributes:
        max_local_error: limit on the relative error (root mean square) of each replaced value, given the same inputs.
            Beyond it the rewrite is taken for wrong rather than approximate.
        max_relative_error: the user's limit on the relative error of each output against the original; ``None``: no
            limit.
    """

    max_local_error: float = 0.5
    max_relative_error: float | None = None
    kind: ClassVar[str] = "approximate"


@dataclass(frozen=True)
class Retrain:
    """The function changes until the model is trained; the error is reported, never enforced."""

    kind: ClassVar[str] = "retrain"


Contract = Exact | Approximate | Retrain

_STRENGTH = {Exact: 0, Approximate: 1, Retrain: 2}


def weakest(contracts: list[Contract]) -> Contract:
    """The contract that holds for passes run one after another."""
    if not contracts:
        return Exact(bitwise=True)
    worst = max(contracts, key=lambda item: _STRENGTH[type(item)])
    if isinstance(worst, Exact):
        exact = [item for item in contracts if isinstance(item, Exact)]
        tolerance, stored = max(item.tolerance for item in exact), any(item.stored for item in exact)
        return Exact(all(item.bitwise for item in exact), tolerance, stored)
    if isinstance(worst, Approximate):
        loose = [item for item in contracts if isinstance(item, Approximate)]
        budgets = [item.max_relative_error for item in loose if item.max_relative_error is not None]
        return Approximate(max(item.max_local_error for item in loose), min(budgets) if budgets else None)
    return worst
