"""How sparse each weight becomes, so that all together have the sparsity that was asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from graphwright.ir.errors import InputError
from graphwright.ir.sparsity import count_of
from graphwright.passes.quantization.allocation import solve

ALLOCATIONS = ("uniform", "erk", "global", "loss")
MEASURES = ("fisher", "output")


@dataclass(frozen=True)
class LossDriven:
    """Sparsities with the least sum of what they cost, by the integer programme that allocates bits
    (:func:`graphwright.allocate`).

    What a weight would lose by ``|w_ij| ‖x_j‖₂`` is tried at each of some levels, all others being whole.

    Attributes:
        measure: what that costs: ``"fisher"``, the expected rise of the loss ``½ Σ F Δ²``, or ``"output"``, the squared
            error of the linear's outputs relative to them; as in :func:`graphwright.sensitivities`.
        spread: how far a weight's sparsity may be from the one asked for.
        levels: how many are tried, evenly, the one asked for among them.
    """

    measure: str = "fisher"
    spread: float = 0.2
    levels: int = 9

    def __post_init__(self) -> None:
        if self.measure not in MEASURES:
            raise InputError(
                f"must be one of {', '.join(map(repr, MEASURES))}, not {self.measure!r}", where="LossDriven: measure"
            )
        if isinstance(self.spread, bool) or not 0.0 < self.spread < 1.0:
            raise InputError(f"must be between 0 and 1, not {self.spread!r}", where="LossDriven: spread")
        if isinstance(self.levels, bool) or not isinstance(self.levels, int) or self.levels < 3 or self.levels % 2 < 1:
            raise InputError(f"must be an odd number from 3 on, not {self.levels!r}", where="LossDriven: levels")

    def tried(self, sparsity: float) -> tuple[float, ...]:
        """The levels, rising, below 1 and not below 0."""
        half = self.levels // 2
        steps = [sparsity + self.spread * (step - half) / half for step in range(self.levels)]
        return tuple(sorted({min(max(step, 0.0), 0.99) for step in steps} | {sparsity}))


def erk(shapes: Mapping[str, tuple[int, int]], sparsity: float) -> dict[str, float]:
    """Sparsities by the Erdős-Rényi rule: a weight ``[out, in]`` keeps a part in proportion to
    ``(out + in) / (out · in)`` (Evci et al. 2020, "Rigging the Lottery", section 3); those that would keep more than
    all of theirs stay whole, and the others make up for it.

    Args:
        shapes: by name.
        sparsity: of all together.
    """
    sizes = {name: out * into for name, (out, into) in shapes.items()}
    budget = (1 - sparsity) * sum(sizes.values())
    whole: set[str] = set()
    while True:
        free = [name for name in shapes if name not in whole]
        raw = {name: sum(shapes[name]) / sizes[name] for name in free}
        total = sum(raw[name] * sizes[name] for name in free)
        left = budget - sum(sizes[name] for name in whole)
        factor = left / total if total else 0.0
        full = {name for name in free if factor * raw[name] > 1}
        if not full:
            return {name: 0.0 if name in whole else 1 - factor * raw[name] for name in shapes}
        whole |= full


def ranked(scores: Mapping[str, torch.Tensor], sparsity: float) -> dict[str, float]:
    """Sparsities where all weights are compared with each other.

    Args:
        scores: by name, of any shape; the least go.
        sparsity: of all together.
    """
    # One number for each weight of the model, for as long as it takes.
    everything = torch.cat([each.reshape(-1) for each in scores.values()])
    count = count_of(len(everything), sparsity)
    if count == 0:
        return dict.fromkeys(scores, 0.0)
    threshold = everything.kthvalue(count).values
    del everything
    below = {name: int((each < threshold).sum()) for name, each in scores.items()}
    rest = count - sum(below.values())
    for name, each in scores.items():  # of those at the threshold, the first
        at = min(rest, int((each == threshold).sum()))
        below[name] += at
        rest -= at
    return {name: below[name] / scores[name].numel() for name in scores}


def by_loss(
    sizes: Mapping[str, int], levels: Sequence[float], cost: Callable[[str], Sequence[float]], sparsity: float
) -> dict[str, float]:
    """Sparsities with the least sum of costs.

    Args:
        sizes: numbers in each weight, by name.
        levels: what is tried.
        cost: of a weight at each level.
        sparsity: of all together, at least.

    Raises:
        InputError: scipy is not installed.
    """
    costs = [cost(name) for name in sizes]
    kept = [[size - count_of(size, level) for level in levels] for size in sizes.values()]
    # Rounding to whole weights must not leave the sparsity asked for out of reach.
    total = sum(sizes.values())
    budget = max(total - count_of(total, sparsity), sum(size - count_of(size, sparsity) for size in sizes.values()))
    chosen = solve(costs, kept, budget)
    return {name: levels[index] for name, index in zip(sizes, chosen, strict=True)}
