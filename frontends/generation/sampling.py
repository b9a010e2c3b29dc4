"""From logits to a token: the definitions and the order of transformers' logits processors, one row at a time.

Repetition penalty (Keskar et al. 2019, CTRL), temperature, top-k (Fan et al. 2018), top-p (Holtzman et al. 2020), min-p
(Nguyen et al. 2024), in this order.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from graphwright.ir.errors import InputError

# Below it, logits divided by the temperature may leave the range of float32.
_COLDEST = 1e-4


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
        scores = logits
        if seen is not None:
            penalty = self.repetition_penalty
            scores = torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)
        if self.is_greedy:
            return scores
        if self.temperature != 1:
            scores = scores / self.temperature
        if self.top_k:
            scores = keep_top_k(scores, self.top_k)
        if self.top_p < 1:
            scores = keep_top_p(scores, self.top_p)
        if self.min_p > 0:
            scores = keep_min_p(scores, self.min_p)
        return scores

    def probabilities(self, logits: torch.Tensor, seen: torch.Tensor | None = None) -> torch.Tensor:
        """What a token is drawn from, float64 ``[V]``; for greedy choice all of it at the likeliest token."""
        scores = self.scores(logits, seen)
        if self.is_greedy:
            return torch.zeros(len(scores), dtype=torch.float64).index_fill_(0, scores.argmax(), 1.0)
        return torch.softmax(scores, dim=-1, dtype=torch.float64)


def keep_top_k(scores: torch.Tensor, count: int) -> torch.Tensor:
    """``TopKLogitsWarper`` on ``[V]``."""
    least = torch.topk(scores, min(count, len(scores))).values[-1]
    return scores.masked_fill(scores < least, float("-inf"))


def keep_top_p(scores: torch.Tensor, mass: float) -> torch.Tensor:
    """``TopPLogitsWarper`` on ``[V]``. Of equal scores the last by number are kept; there it is left open."""
    # numpy sorts values alone many times faster than torch, which brings the indices along.
    ordered = torch.from_numpy(scores.numpy().copy())
    ordered.numpy().sort()
    out = int((ordered.softmax(dim=-1).cumsum(dim=-1) <= 1 - mass)[:-1].sum())
    if out == 0:
        return scores
    least = ordered[out]
    removed = scores < least
    ties = out - int(removed.sum())
    if ties:
        removed[torch.nonzero(scores == least).flatten()[:ties]] = True
    return scores.masked_fill(removed, float("-inf"))


def keep_min_p(scores: torch.Tensor, least: float) -> torch.Tensor:
    """``MinPLogitsWarper`` on ``[V]``."""
    probabilities = torch.softmax(scores, dim=-1)
    best = probabilities.argmax()
    removed = probabilities < least * probabilities[best]
    removed[best] = False
    return scores.masked_fill(removed, float("-inf"))


def draw(probabilities: torch.Tensor, generator: torch.Generator) -> int:
    """A token with these probabilities (need not sum to 1): the inverse of their running sum at one uniform number.

    Args:
        probabilities: float64 ``[V]``, not negative, not all 0.
        generator: moved on by one number.
    """
    sums = probabilities.cumsum(dim=0)
    at = torch.rand((), dtype=torch.float64, generator=generator) * sums[-1]
    found = int(torch.searchsorted(sums, at, right=True))
    if found < len(sums) and probabilities[found] > 0:
        return found
    return int(torch.nonzero(probabilities).flatten()[-1])  # rounding put the number at the very end


def _require(fits: bool, name: str, value: object, wanted: str) -> None:
    if not fits:
        raise InputError(f"must be {wanted}, not {value!r}", where=f"argument {name!r}")
