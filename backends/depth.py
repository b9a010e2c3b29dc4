"""Decoding whose later tokens run through fewer layers: how many layers which token runs through."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import torch

from graphwright.ir.errors import InputError


@dataclass(frozen=True)
class DepthSchedule:
    """How many layers the token at each place of an answer runs through: ``max(floor, ⌊L · alphaⁱ⌋)``, for i from 0 on
    (D3, the power law of positions). It changes what a model says.

    Attributes:
        alpha: above 0, at most 1; with 1 every token runs through all layers.
        floor: least number of layers; at least 1.
        step: layers go in multiples of this, rounded up: those of one repetition, where the classifier was trained on
            repetitions only.
    """

    alpha: float = 1.0
    floor: int = 1
    step: int = 1

    def __post_init__(self) -> None:
        if not (math.isfinite(self.alpha) and 0 < self.alpha <= 1):
            raise InputError(f"must be above 0 and at most 1, not {self.alpha!r}", where="DepthSchedule: alpha")
        for name in ("floor", "step"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"must be a number of layers, not {value!r}", where=f"DepthSchedule: {name}")

    def depth(self, layers: int, place: int) -> int:
        """Layers for the token at this place of an answer, of a model that has so many."""
        wanted = max(self.floor, math.floor(layers * self.alpha ** max(place, 0)), 1)
        return min(layers, -(-wanted // self.step) * self.step)


class Depths:
    """The depth of every row of every step.

    A step of several tokens is a prompt and runs through all layers; the tokens after it count from 0. Since depth only
    falls from token to token, every layer that runs finds the keys and values of all tokens before. Tokens that are
    taken back count again from where the next step starts.

    Args:
        schedule: depth by place.
        layers: of the decoder.
        slots: of the session.

    Attributes:
        last: of the rows of the last step, in no order.
        taken: how many tokens of answers and pieces of prompts have run through so many layers so far.
    """

    def __init__(self, schedule: DepthSchedule, layers: int, slots: int) -> None:
        self.schedule, self.layers = schedule, layers
        self.last: list[int] = []
        self.taken: Counter[int] = Counter()
        self._origins = [0] * slots

    def rows(self, tokens: torch.Tensor, slots: torch.Tensor, starts: torch.Tensor) -> dict[int, torch.Tensor]:
        """The rows of a step, int64, by how many layers they run through.

        Args:
            tokens: ``[B, S]``.
            slots, starts: ``[B]``.
        """
        count = tokens.shape[1]
        found: dict[int, list[int]] = {}
        for row, (slot, start) in enumerate(zip(slots.tolist(), starts.tolist(), strict=True)):
            if count > 1 or start == 0:
                self._origins[slot] = start + count
                depth = self.layers
            else:
                self._origins[slot] = min(self._origins[slot], start)
                depth = self.schedule.depth(self.layers, start - self._origins[slot])
            found.setdefault(depth, []).append(row)
        self.last = [depth for depth, rows in found.items() for _ in rows]
        self.taken.update(self.last)
        return {depth: torch.tensor(rows) for depth, rows in found.items()}

    def copied(self, source: int, target: int, length: int) -> None:
        """The first positions of a slot were copied to another."""
        self._origins[target] = min(self._origins[source], length)
