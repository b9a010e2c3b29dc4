"""Which format each linear gets, so that the model loses least within a budget of bytes: an integer programme."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from graphwright.ir.errors import InputError
from graphwright.passes.quantization.overrides import Override
from graphwright.passes.quantization.sensitivity.table import Sensitivities

# Differences of the objective are scaled to this range: the solver's tolerances are absolute, about 1e-6.
_RANGE = 1e6


@dataclass(frozen=True)
class Allocation:
    """One candidate for each weight.

    Attributes:
        overrides: for :class:`QuantizeLinears`, by weight name.
        loss: the sum of the sensitivities.
        bytes: what the weights take, scales and zero points included.
        bits: the same for each parameter.
        budget_bytes: how many bytes were allowed.
        choices: index of the candidate of each weight, in the table's order.
    """

    overrides: dict[str, Override]
    loss: float
    bytes: int
    bits: float
    budget_bytes: int
    choices: tuple[int, ...]
    table: Sensitivities

    def __str__(self) -> str:
        from graphwright.passes.rendering.terminal import plain_text

        return plain_text(self.__rich__())

    def __rich__(self) -> Any:
        from graphwright.passes.rendering.terminal import columns

        names = self.table.names()
        title = f"{self.bits:.3f} bits per weight, {self.bytes} of {self.budget_bytes} bytes, loss {self.loss:.4g}"
        rows = [
            [row.weight, names[choice], f"{8 * row.stored[choice] / row.parameters:.3f}", f"{row.values[choice]:.3g}"]
            for row, choice in zip(self.table.linears, self.choices, strict=True)
        ]
        return columns(title, ["weight", "format", "bits", "sensitivity"], rows, left=2)


def allocate(
    sensitivities: Sensitivities, *, budget_bits: float | None = None, budget_bytes: int | None = None
) -> Allocation:
    """The choice of one candidate for each weight with the least sum of sensitivities that fits a budget.

    Solved exactly, as an integer programme by HiGHS (``scipy.optimize.milp``): minimise ``Σ s[i,c] x[i,c]`` with
    ``Σ_c x[i,c] = 1`` and ``Σ b[i,c] x[i,c] ≤ budget``, ``x`` binary.

    Args:
        sensitivities: the table; a candidate ``None`` may leave linears in floating point.
        budget_bits: bytes allowed, as bits for each parameter of the table's linears, scales and zero points included.
        budget_bytes: bytes allowed.

    Raises:
        InputError: not exactly one budget is given, or none of the choices fits it (the least one is named); scipy is
            not installed; a sensitivity is not finite.
    """
    parameters = sensitivities.parameters
    budget = _budget(budget_bits, budget_bytes, parameters)
    rows = sensitivities.linears
    least = sum(min(row.stored) for row in rows)
    if least > budget:
        raise InputError(
            f"no choice of these candidates fits {budget} bytes",
            where="allocate",
            hint=f"the least there is: budget_bytes={least}, which is budget_bits={_up(8 * least / parameters)}",
        )
    for row in rows:
        if not all(math.isfinite(value) for value in row.values):
            raise InputError("is not finite", where=f"the sensitivity of weight {row.weight!r}")
    choices = solve([row.values for row in rows], [row.stored for row in rows], budget)
    stored = sum(row.stored[choice] for row, choice in zip(rows, choices, strict=True))
    loss = sum(row.values[choice] for row, choice in zip(rows, choices, strict=True))
    overrides = {row.weight: sensitivities.candidates[choice] for row, choice in zip(rows, choices, strict=True)}
    return Allocation(overrides, loss, stored, 8 * stored / parameters, budget, tuple(choices), sensitivities)


def solve(costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], budget: int) -> list[int]:
    """One index per row with the least sum of costs such that the sizes sum to the budget at most.

    Args:
        costs: finite; as many per row as sizes.
        sizes: not negative.
        budget: at least the sum of every row's least size.

    Raises:
        InputError: scipy is not installed, or its solver gives up.
    """
    try:
        import numpy as np
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_matrix
    except ImportError as error:
        raise InputError(f"needs scipy: {error}", where="allocate", hint="pip install 'graphwright[search]'") from error
    options = [_undominated(cost, size) for cost, size in zip(costs, sizes, strict=True)]
    places = [(row, index) for row, kept in enumerate(options) for index in kept]
    lows = [min(cost) for cost in costs]
    spread = sum(max(costs[row][index] for index in kept) - lows[row] for row, kept in enumerate(options))
    scale = _RANGE / spread if spread > 0 else 0.0
    objective = np.array([(costs[row][index] - lows[row]) * scale for row, index in places])
    unit = max(1, math.gcd(*(sizes[row][index] for row, index in places)))
    weights = np.array([sizes[row][index] // unit for row, index in places], dtype=np.float64)
    ones = csr_matrix(
        (np.ones(len(places)), ([row for row, _ in places], range(len(places)))), shape=(len(costs), len(places))
    )
    constraints = [
        LinearConstraint(ones, np.ones(len(costs)), np.ones(len(costs))),
        LinearConstraint(csr_matrix(weights), -np.inf, budget // unit),
    ]
    while True:
        found = milp(
            objective,
            constraints=constraints,
            integrality=np.ones(len(places)),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": 0.0},
        )
        if found.x is None:
            raise InputError(f"the solver found no allocation: {found.message}", where="allocate")
        chosen = [place for place, value in zip(places, found.x, strict=True) if value > 0.5]
        if sum(sizes[row][index] for row, index in chosen) <= budget:
            return [index for _, index in chosen]
        # Within the solver's tolerance, but not within the budget: exclude this choice and look on.
        taken = (found.x > 0.5).astype(np.float64)
        constraints.append(LinearConstraint(csr_matrix(taken), -np.inf, len(costs) - 1))


def _undominated(costs: Sequence[float], sizes: Sequence[int]) -> list[int]:
    """Candidates than which none is better in one respect and as good in the other; of equals the first."""

    def is_beaten(index: int) -> bool:
        mine = (costs[index], sizes[index])
        return any(
            costs[other] <= mine[0]
            and sizes[other] <= mine[1]
            and ((costs[other], sizes[other]) != mine or other < index)
            for other in range(len(costs))
        )

    return [index for index in range(len(costs)) if not is_beaten(index)]


def _budget(bits: float | None, size: int | None, parameters: int) -> int:
    if (bits is None) == (size is None):
        raise InputError("takes either budget_bits= or budget_bytes=", where="allocate")
    given = bits if bits is not None else size
    if isinstance(given, bool) or not isinstance(given, int | float) or not given > 0:
        raise InputError(f"must be a positive number, not {given!r}", where="allocate: budget")
    return math.floor(bits * parameters / 8) if bits is not None else int(given)


def _up(value: float) -> float:
    """Rounded up to three digits after the point."""
    return math.ceil(value * 1000) / 1000
