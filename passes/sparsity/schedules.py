"""How sparse a model is to be at each step of its training."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from graphwright.ir.errors import InputError

# Kurtic et al. 2023, "Sparse Fine-tuning for Inference Acceleration of Large Language Models".
_LADDER = (0.5, 0.67, 0.75, 0.8, 0.86, 0.9)


class SparsitySchedule(ABC):
    """A sparsity for every step, which never falls."""

    @abstractmethod
    def at(self, step: int) -> float:
        """The sparsity at a step, from 0 on; 0 before pruning begins."""

    @property
    @abstractmethod
    def last(self) -> int:
        """The step from which on nothing changes."""


@dataclass(frozen=True)
class CubicSchedule(SparsitySchedule):
    """Fast at first, slowly at the end: ``s_f + (s_i - s_f) (1 - (t - t_0) / n)³`` (Zhu and Gupta 2017, "To Prune, or
    Not to Prune", equation 1).

    Attributes:
        final: ``s_f``.
        steps: ``n``: from the first pruning to the last.
        initial: ``s_i``: what the first prunes to.
        start: ``t_0``, the step of the first.
        every: steps from one pruning to the next (the paper's ``Δt``); the last is at ``start + steps``.
    """

    final: float
    steps: int
    initial: float = 0.0
    start: int = 0
    every: int = 1

    def __post_init__(self) -> None:
        _fraction("CubicSchedule: final", self.final)
        _fraction("CubicSchedule: initial", self.initial)
        for option, lowest in (("steps", 1), ("start", 0), ("every", 1)):
            _whole(f"CubicSchedule: {option}", getattr(self, option), lowest)
        if self.final < self.initial:
            raise InputError(
                f"goes down from {self.initial} to {self.final}",
                where="CubicSchedule",
                hint="masks only grow: give a final sparsity above the initial one",
            )

    def at(self, step: int) -> float:
        """The sparsity at a step."""
        if step < self.start:
            return 0.0
        done = min(step - self.start, self.steps)
        if done < self.steps:
            done -= done % self.every
        return self.final + (self.initial - self.final) * (1 - done / self.steps) ** 3

    @property
    def last(self) -> int:
        """The step of the last pruning."""
        return self.start + self.steps


@dataclass(frozen=True)
class LadderSchedule(SparsitySchedule):
    """One level after another, each held for as many steps (Kurtic et al. 2023; its levels are the usual ones).

    Attributes:
        every: steps at each level.
        levels: rising.
        start: the step at which the first is reached.
    """

    every: int
    levels: tuple[float, ...] = _LADDER
    start: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", tuple(self.levels))
        _whole("LadderSchedule: every", self.every, 1)
        _whole("LadderSchedule: start", self.start, 0)
        if not self.levels:
            raise InputError("has no levels", where="LadderSchedule")
        for level in self.levels:
            _fraction("LadderSchedule: levels", level)
        for lower, upper in zip(self.levels, self.levels[1:]):
            if upper <= lower:
                raise InputError(
                    f"goes down from {lower} to {upper}" if upper < lower else f"has {lower} twice",
                    where="LadderSchedule: levels",
                    hint="masks only grow: give rising levels",
                )

    def at(self, step: int) -> float:
        """The sparsity at a step."""
        if step < self.start:
            return 0.0
        return self.levels[min((step - self.start) // self.every, len(self.levels) - 1)]

    @property
    def last(self) -> int:
        """The step at which the last level is reached."""
        return self.start + self.every * (len(self.levels) - 1)


def _fraction(where: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise InputError(f"must be at least 0 and below 1, not {value!r}", where=where)


def _whole(where: str, value: object, lowest: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
        raise InputError(f"must be an integer, {lowest} or more, not {value!r}", where=where)
