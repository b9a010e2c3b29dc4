"""From logits to a token: the definitions and the order of transformers' logits processors, one row at a time.

Repetition penalty (Keskar et al. 2019, CTRL), temperature, top-k (Fan et al. 2018), top-p (Holtzman et al. 2020), min-p
(Nguyen et al. 2024), in this order.

A vocabulary is small work for one thread, and torch would share it out: its threads, which wait busily for more, would
then take the time of those that run the next step. So this is numpy, and of torch what runs in one thread for one row.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from graphwright.ir.errors import InputError

# Below it, logits divided by the temperature may leave the range of float32.
_COLDEST = 1e-4

Scores = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen.

    Attributes:
        temperature: 0 takes the likeliest token; else logits are divided by it.
        top_k: only this many likeliest tokens, and those that tie with the last of them; 0 for all.
        top_p: only the likeliest tokens whose probabilities reach this sum; 1 for all.
        min_p: only tokens at least this likely, relative to the likeliest; 0 for all.
        repetition_penalty: logits of tokens that the prompt or the answer holds are divided by it where positive and
            multiplied where negative; 1 changes nothing.

    Raises:
        InputError: a value is out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        cold = 0 < self.temperature < _COLDEST
        _require(
            0 <= self.temperature < float("inf") and not cold, "temperature", self.temperature, f"0 or from {_COLDEST}"
        )
        _require(isinstance(self.top_k, int) and self.top_k >= 0, "top_k", self.top_k, "a whole number, 0 for all")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        _require(0 <= self.min_p <= 1, "min_p", self.min_p, "from 0 to 1")
        penalty = self.repetition_penalty
        _require(0 < penalty < float("inf"), "repetition_penalty", penalty, "above 0; 1 changes nothing")

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.temperature == 0

    @property
    def is_plain(self) -> bool:
        """Whether the token depends on nothing but its row's largest logit."""
        return self.is_greedy and self.repetition_penalty == 1

    def seen(self, tokens: Iterable[int], vocabulary: int) -> torch.Tensor | None:
        """Which tokens the penalty is for, bool ``[V]``; ``None`` where there is no penalty."""
        if self.repetition_penalty == 1:
            return None
        mask = torch.zeros(vocabulary, dtype=torch.bool)
        mask[torch.tensor(list(tokens), dtype=torch.int64)] = True
        return mask

    def scores(self, logits: torch.Tensor, seen: torch.Tensor | None = None) -> torch.Tensor:
        """Logits as they are after every processor: minus infinity for tokens that are out.

        Args:
            logits: float32 ``[V]``.
            seen: what :meth:`seen` gave, for a penalty.
        """
        scores = logits.numpy()
        with np.errstate(over="ignore"):
            if seen is not None:
                scores = _penalized(scores, np.flatnonzero(seen.numpy()), self.repetition_penalty)
            if self.temperature not in (0, 1):
                scores = scores / np.float32(self.temperature)
        if not self.is_greedy:
            if self.top_k:
                scores = keep_top_k(scores, self.top_k)
            if self.top_p < 1:
                scores = keep_top_p(scores, self.top_p)
            if self.min_p > 0:
                scores = keep_min_p(scores, self.min_p)
        return torch.from_numpy(scores)

    def best(self, logits: torch.Tensor, seen: torch.Tensor | None = None) -> int:
        """The likeliest token, the first of several."""
        return int(self.scores(logits, seen).numpy().argmax())

    def probabilities(self, logits: torch.Tensor, seen: torch.Tensor | None = None) -> torch.Tensor:
        """What a token is drawn from, float64 ``[V]``; for greedy choice all of it at the likeliest token."""
        scores = self.scores(logits, seen).numpy()
        found = np.zeros(len(scores))
        if self.is_greedy:
            found[scores.argmax()] = 1.0
            return torch.from_numpy(found)
        best = scores.max()
        if np.isinf(best):  # what a small temperature has driven out of float32: only the largest are left
            found[scores == best] = 1.0
        else:
            kept = np.flatnonzero(scores > -np.inf)
            found[kept] = np.exp(scores[kept].astype(np.float64) - best)
        found /= found.sum()
        return torch.from_numpy(found)


def keep_top_k(scores: Scores, count: int) -> Scores:
    """``TopKLogitsWarper`` on ``[V]``."""
    if count >= len(scores):
        return scores
    least = np.partition(scores, len(scores) - count)[len(scores) - count]
    return _without(scores, scores < least)


def keep_top_p(scores: Scores, mass: float) -> Scores:
    """``TopPLogitsWarper`` on ``[V]``. Of equal scores the last by number are kept; there it is left open."""
    # Values alone are sorted many times faster than with their places.
    ordered = np.sort(scores)
    sums = torch.from_numpy(ordered).softmax(dim=0).cumsum(dim=0).numpy()
    out = int(np.count_nonzero(sums[:-1] <= np.float32(1 - mass)))
    if out == 0:
        return scores
    least = ordered[out]
    removed = scores < least
    ties = out - int(np.count_nonzero(removed))
    if ties:
        removed[np.flatnonzero(scores == least)[:ties]] = True
    return _without(scores, removed)


def keep_min_p(scores: Scores, least: float) -> Scores:
    """``MinPLogitsWarper`` on ``[V]``."""
    probabilities = torch.from_numpy(scores).softmax(dim=0).numpy()
    best = int(probabilities.argmax())
    removed = probabilities < np.float32(least) * probabilities[best]
    removed[best] = False
    return _without(scores, removed)


def draw(probabilities: torch.Tensor, generator: torch.Generator) -> int:
    """A token with these probabilities (need not sum to 1): the inverse of their running sum at one uniform number.

    Args:
        probabilities: float64 ``[V]``, not negative, not all 0.
        generator: moved on by one number.
    """
    return pick(probabilities, uniform(generator))


def uniform(generator: torch.Generator) -> float:
    """A random number from 0 up to 1; the generator is moved on by one."""
    return float(torch.rand((), dtype=torch.float64, generator=generator))


def pick(probabilities: torch.Tensor, number: float) -> int:
    """The token at which the running sum of the probabilities (float64 ``[V]``) reaches this part of the whole."""
    sums = probabilities.numpy().cumsum()
    at = number * sums[-1]
    # Rounding may put the number at the very end: then it is the last token that can be.
    last = int(np.searchsorted(sums, sums[-1], side="left"))
    return min(int(np.searchsorted(sums, at, side="right")), last)


def what_is_wrong(logits: torch.Tensor) -> str:
    """``"NaN"`` or ``"infinite"`` where a row's largest logit is no number, else nothing.

    Args:
        logits: float32 ``[R, V]``.
    """
    largest = logits.numpy().max(axis=1)  # NaN where one is among them
    if np.isfinite(largest).all():
        return ""
    return "NaN" if np.isnan(largest).any() else "infinite"


def _penalized(scores: Scores, seen: npt.NDArray[np.intp], penalty: float) -> Scores:
    values = scores[seen]
    result: Scores = scores.copy()
    result[seen] = np.where(values < 0, values * np.float32(penalty), values / np.float32(penalty))
    return result


def _without(scores: Scores, removed: npt.NDArray[np.bool_]) -> Scores:
    result: Scores = scores.copy()
    result[removed] = -np.inf
    return result


def _require(fits: bool, name: str, value: object, wanted: str) -> None:
    if not fits:
        raise InputError(f"must be {wanted}, not {value!r}", where=f"argument {name!r}")
