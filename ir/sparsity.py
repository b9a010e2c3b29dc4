"""Patterns of zeros in a weight: any, N of every M columns, or whole blocks."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from graphwright.ir.errors import InputError

_HINT = "use 'unstructured', N:M such as '2:4', or a block of rows and columns such as '1x4' or '16x1'"


@dataclass(frozen=True)
class SparsityPattern:
    """Where a weight ``[out, in]`` may have zeros.

    Sizes that do not divide are refused, not padded: a kernel that relies on the pattern relies on it everywhere.

    Attributes:
        kept: N of N:M: how many of every ``among`` neighbouring columns of a row stay.
        among: M of N:M; 0 for other patterns.
        rows: of a block that goes as a whole.
        columns: of a block that goes as a whole.
    """

    kept: int = 0
    among: int = 0
    rows: int = 1
    columns: int = 1

    @classmethod
    def of(cls, given: object, *, where: str) -> SparsityPattern:
        """A pattern from its text, such as ``"2:4"``, or as it is.

        Args:
            given: ``"unstructured"``, ``"N:M"`` with ``0 < N < M``, ``"RxC"``, or a pattern.
            where: for messages.

        Raises:
            InputError: it is none of these.
        """
        if isinstance(given, SparsityPattern):
            return given
        if given == "unstructured":
            return cls()
        found = re.fullmatch(r"(\d+)([:x])(\d+)", given) if isinstance(given, str) else None
        if found is None:
            raise InputError(f"{given!r} is no pattern of zeros", where=where, hint=_HINT)
        first, second = int(found[1]), int(found[3])
        if found[2] == ":":
            if not 0 < first < second:
                raise InputError(f"{given!r} keeps {first} of every {second}", where=where, hint="give 0 < N < M")
            return cls(kept=first, among=second)
        if first < 1 or second < 1:
            raise InputError(f"{given!r} has blocks of nothing", where=where, hint=_HINT)
        return cls(rows=first, columns=second)

    def __str__(self) -> str:
        if self.among:
            return f"{self.kept}:{self.among}"
        return "unstructured" if (self.rows, self.columns) == (1, 1) else f"{self.rows}x{self.columns}"

    @property
    def implied(self) -> float | None:
        """The sparsity that the pattern alone says: ``1 - N/M``; ``None`` where it says none."""
        return 1 - self.kept / self.among if self.among else None

    def objection(self, shape: Sequence[int]) -> str | None:
        """Why a weight ``[out, in]`` cannot have it, or ``None``."""
        out, into = shape
        if self.among:
            return f"{into} columns are no multiple of {self.among}" if into % self.among else None
        if out % self.rows or into % self.columns:
            return f"[{out}, {into}] does not divide into blocks of {self.rows} by {self.columns}"
        return None

    def mask(self, scores: torch.Tensor, sparsity: float, *, by_row: bool = False) -> torch.Tensor:
        """Which weights stay: those with the greatest scores; of equal ones the later ones.

        Args:
            scores: ``[out, in]``, floating, without NaN, of a shape that the pattern divides.
            sparsity: fraction that goes, rounded to whole weights or blocks; not looked at for N:M.
            by_row: weights (or blocks) are compared within their row (of blocks), each of which loses as many; else
                within the whole matrix. N:M has its own comparison.

        Returns:
            bool ``[out, in]``.
        """
        if self.among:
            grouped = scores.reshape(len(scores), -1, self.among)
            return ~least(grouped.flatten(0, 1), self.among - self.kept).view_as(scores)
        whole = self.rows == self.columns == 1
        blocks = self.blocks(scores)
        rows = blocks if by_row else blocks.reshape(1, -1)
        kept = ~least(rows, count_of(rows.shape[1], sparsity)).view_as(blocks)
        if whole:
            return kept
        return kept.repeat_interleave(self.rows, 0).repeat_interleave(self.columns, 1)

    def blocks(self, scores: torch.Tensor) -> torch.Tensor:
        """The sum of the scores ``[out, in]`` of every block, ``[out / rows, in / columns]``."""
        if self.rows == self.columns == 1:
            return scores
        found: torch.Tensor = scores.unflatten(0, (-1, self.rows)).unflatten(2, (-1, self.columns)).sum((1, 3))
        return found

    def holds(self, mask: torch.Tensor) -> bool:
        """Whether a mask ``[out, in]``, bool, has no more kept weights than the pattern allows and whole blocks."""
        if self.objection(mask.shape) is not None:
            return False
        if self.among:
            return bool((mask.reshape(len(mask), -1, self.among).sum(-1) <= self.kept).all())
        blocks = mask.unflatten(0, (-1, self.rows)).unflatten(2, (-1, self.columns))
        return bool((blocks.any(3).any(1) == blocks.all(3).all(1)).all())


UNSTRUCTURED = SparsityPattern()


def count_of(total: int, sparsity: float) -> int:
    """How many of so many go: the nearest whole number, halves downwards, so that a half of one leaves it."""
    return max(0, math.ceil(total * sparsity - 0.5))


def least(scores: torch.Tensor, count: int) -> torch.Tensor:
    """The ``count`` least of every row ``[rows, n]``, bool; of equal ones the first."""
    if count <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = scores.kthvalue(count, dim=1, keepdim=True).values
    found, equal = scores < threshold, scores == threshold
    missing = count - found.sum(1, keepdim=True)
    if bool((equal.sum(1, keepdim=True) > missing).any()):
        equal &= equal.cumsum(1) <= missing
    return found | equal
