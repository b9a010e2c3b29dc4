"""In which order recipes are tried. A strategy is a generator: it gives a choice and is sent what came of it.

What it gives depends on the table of sensitivities and on earlier trials alone, so a search that was killed goes the
same way again.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Generator
from dataclasses import dataclass

from graphwright.frontends.autoquantize.goals import Limits
from graphwright.frontends.autoquantize.space import Choice, SearchSpace
from graphwright.frontends.autoquantize.trials import Trial
from graphwright.ir.errors import InputError
from graphwright.passes.quantization.allocation import allocate
from graphwright.passes.quantization.overrides import Override
from graphwright.passes.quantization.sensitivity import Sensitivities, skip_by_kurtosis

Strategy = Generator[Choice, Trial, None]

# How many times the allowed loss a recipe may be foretold, and is still tried.
_HOPELESS = 4.0
# How many times the allowed loss a recipe may have, and its most sensitive linears are still given a finer format.
_REPAIRABLE = 10.0
# The most linears that are treated otherwise, as a fraction of all.
_MOST_FINER = 0.5


@dataclass(frozen=True)
class Plan:
    """What strategies go by.

    Attributes:
        space: the recipes there are.
        table: sensitivities to every format of the space, floating point and ``space.finer``.
        most: the allowed loss.
        limits: on bytes and time.
        rest: bytes of what is not quantised.
        has_data: whether there is calibration data.
    """

    space: SearchSpace
    table: Sensitivities
    most: float
    limits: Limits
    rest: int
    has_data: bool

    def column(self, form: Override) -> int:
        """Where a format stands in the table."""
        return self.table.candidates.index(form)

    def bytes_of(self, choice: Choice) -> int:
        """Bytes that a choice will take, linears and the rest."""
        usual = self.column(choice.form)
        total = self.rest
        for row in self.table.linears:
            own = row.weight in choice.overrides
            total += row.stored[self.column(choice.overrides[row.weight]) if own else usual]
        return total

    def foretold(self, choice: Choice) -> float:
        """What a choice costs, in units of the table."""
        usual = self.column(choice.form)
        return sum(
            row.values[self.column(choice.overrides[row.weight]) if row.weight in choice.overrides else usual]
            for row in self.table.linears
        )

    def families(self) -> list[Choice]:
        """Formats, the smallest first; of equal ones those with the least foretold cost."""
        found = [each for each in self.space.families(has_data=self.has_data) if self.fits(each)]
        return sorted(found, key=lambda each: (self.bytes_of(each), self.foretold(each), each.label))

    def fits(self, choice: Choice) -> bool:
        """Whether it keeps within the bytes."""
        return self.limits.bytes is None or self.bytes_of(choice) <= self.limits.bytes

    def methods(self, choice: Choice) -> list[Choice]:
        """A family with each rounding."""
        names = self.space.methods_with(has_data=self.has_data)
        return [dataclasses.replace(choice, rounding=name) for name in names]

    def most_finer(self) -> int:
        """How many linears may be treated otherwise."""
        return max(1, int(len(self.table.linears) * _MOST_FINER))

    def with_finer(self, choice: Choice, count: int) -> Choice:
        """A choice with so many linears in a finer format: those that gain most for each byte they take more."""
        if choice.activations == "int8":
            overrides: dict[str, Override] = dict(skip_by_kurtosis(self.table, count=count))
            kept: Override = None
        else:
            finer = self.space.finer
            kept = finer if finer is not None and finer.get("bits", 8) > choice.bits else None
            usual, other = self.column(choice.form), self.column(kept)
            gains = {
                row.weight: (row.values[usual] - row.values[other]) / max(1, row.stored[other] - row.stored[usual])
                for row in self.table.linears
            }
            overrides = dict.fromkeys(sorted(gains, key=lambda name: (-gains[name], name))[:count], kept)
        form = "floating point" if kept is None else f"INT{kept['bits']}"
        return dataclasses.replace(choice, overrides=overrides, note=f"{count} of {len(self.table.linears)} in {form}")


def first(plan: Plan) -> Strategy:
    """The first recipe that meets the target, the smallest tried first.

    Formats go by size. Those that the table foretells to lose far too much, on the scale of what was measured so far,
    wait until all others have failed. Every other one is tried with each rounding, the cheapest first; where all lose
    too much, but not far too much, the most sensitive linears get a finer format, and how many is bisected.
    """
    scale: float | None = None
    waiting: list[Choice] = []
    for family in plan.families():
        foretold = plan.foretold(family)
        if scale is not None and scale * foretold > _HOPELESS * plan.most:
            waiting.append(family)
            continue
        best: tuple[float, Choice] | None = None
        for choice in plan.methods(family):
            trial = yield choice
            if trial.met:
                return
            if trial.loss is None:
                continue
            if trial.loss > 0 and foretold > 0:
                scale = trial.loss / foretold
            if best is None or trial.loss < best[0]:
                best = (trial.loss, choice)
        if best is None or not plan.most < best[0] <= _REPAIRABLE * max(plan.most, 1e-9):
            continue  # it failed, loses far too much, or fails for another reason than its loss
        met = yield from _bisect(plan, best[1])
        if met:
            return
    for family in sorted(waiting, key=plan.foretold):
        trial = yield family
        if trial.met:
            return


def _bisect(plan: Plan, choice: Choice) -> Generator[Choice, Trial, bool]:
    """Find the least number of linears in a finer format that meets the target, if any does."""
    low, high, met, capped = 0, plan.most_finer(), False, False
    count = max(1, high // 4)
    while high - low > (1 if met else 0):
        candidate = plan.with_finer(choice, count)
        if not plan.fits(candidate):  # more linears would take even more bytes
            high, capped = count - 1, True
        elif (yield candidate).met:
            high, met = count, True
        else:
            low = count
        count = max(low + 1, (low + high) // 2 if met or capped else min(high, 2 * count))
    return met


def pareto(plan: Plan) -> Strategy:
    """Every format with every rounding, then mixtures of bytes between theirs, solved exactly."""
    families = plan.families()
    for family in families:
        for choice in plan.methods(family):
            _ = yield choice  # what is sent does not matter, and lists take none
    sizes = sorted({plan.bytes_of(family) - plan.rest for family in families if family.activations == "none"})
    plain = [family for family in families if family.activations == "none"]
    if not plain:
        return
    seen: list[dict[str, Override]] = []
    for small, large in itertools.pairwise(sizes):
        try:
            found = allocate(plan.table, budget_bytes=(small + large) // 2)
        except InputError as error:
            if "scipy" in str(error):
                return  # mixtures need it; the formats by themselves do not
            raise
        if found.overrides in seen:
            continue
        seen.append(found.overrides)
        base = min(plain, key=lambda family: abs(plan.bytes_of(family) - plan.rest - found.bytes))
        note = f"mixed to {found.bits:.2f} bits"
        mixed = dataclasses.replace(plan.methods(base)[-1], overrides=found.overrides, note=note)
        if plan.fits(mixed):
            yield mixed


# mode -> strategy
MODES: dict[str, Callable[[Plan], Strategy]] = {"first": first, "pareto": pareto}


def is_better(new: Trial, old: Trial | None, *, most: float) -> bool:
    """Whether a trial is the better result.

    Among those that meet the target the smallest; else, among those that break no limit, what loses least.
    """
    return old is None or _rank(new, most) < _rank(old, most)


def _rank(trial: Trial, most: float) -> tuple[float, ...]:
    loss, size = (math.inf if value is None else value for value in (trial.loss, trial.bytes))
    if trial.met:
        return (0, size, loss, trial.index)
    if trial.loss is None:
        return (3, loss, size, trial.index)
    only_loss = loss > most and not trial.unproven
    return (1 if only_loss else 2, loss, size, trial.index)
