"""What is learnt of a value from calibration data."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from graphwright.passes.calibration.products import exact_products

# Rows that are multiplied at once: products of few rows are bound by reading and writing the moment.
_CHUNK_ROWS = 2048
# Columns of the moment computed at once; those left of its diagonal are taken over from its other half.
_PANEL = 1024
# Rows kept of each input, spread over the calibration data: enough to compare roundings, little to hold.
_SAMPLE_ROWS = 1024


@dataclass
class Observed:
    """Statistics of a value ``[..., features]`` over all its rows, in float32.

    Attributes:
        moment: ``Σ x xᵀ``, ``[features, features]``.
        low: least value of each feature, ``[features]``.
        high: greatest value of each feature, ``[features]``.
        rows: some of the rows, evenly spread, ``[at most 1024, features]``.
    """

    moment: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor
    rows: torch.Tensor
    _stride: int = 1
    _seen: int = 0

    @classmethod
    def nothing(cls, features: int) -> Observed:
        """Before the first row."""
        low = torch.full((features,), float("inf"))
        return cls(torch.zeros(features, features), low, -low, torch.empty(0, features))

    def add(self, rows: torch.Tensor) -> None:
        """Count more rows, ``[n, features]`` float32."""
        if not len(rows):
            return
        self._accumulate(rows)
        self._mirror()

    def _accumulate(self, rows: torch.Tensor) -> None:
        """Count more rows, the moment's upper half only; nothing of them is kept."""
        with exact_products(rows):
            for start in range(0, rows.shape[1], _PANEL):
                panel = slice(start, start + _PANEL)
                self.moment[panel, start:].addmm_(rows[:, panel].T, rows[:, start:])
        self.low, self.high = torch.minimum(self.low, rows.amin(0)), torch.maximum(self.high, rows.amax(0))
        # Rows whose number is a multiple of the stride are kept; it grows before they are copied.
        while len(self.rows) + len(range(-self._seen % self._stride, len(rows), self._stride)) > _SAMPLE_ROWS:
            self.rows, self._stride = self.rows[::2].clone(), 2 * self._stride
        self.rows = torch.cat((self.rows, rows[-self._seen % self._stride :: self._stride]))
        self._seen += len(rows)

    def _mirror(self) -> None:
        """Take over the moment's lower half from the upper one, so that it is symmetric to the last bit."""
        for start in range(0, self.moment.shape[0], _PANEL):
            panel = slice(start, start + _PANEL)
            self.moment[panel, :start] = self.moment[:start, panel].T
            square = self.moment[panel, panel]
            square.triu_().add_(square.triu(1).T)

    @classmethod
    def over(cls, batches: Iterable[torch.Tensor]) -> Observed:
        """Statistics over batches of rows, ``[n, features]`` float32 each; at least one batch."""
        gathering = Gathering()
        for rows in batches:
            gathering.add(rows)
        return gathering.done()

    def scaled(self, factors: torch.Tensor) -> Observed:
        """Statistics of the same rows with every feature multiplied by its factor, ``[features]``, positive."""
        moment = self.moment * factors * factors.unsqueeze(-1)
        return Observed(moment, self.low * factors, self.high * factors, self.rows * factors, self._stride, self._seen)

    def copy(self) -> Observed:
        """The same, for someone who may use the moment up."""
        return dataclasses.replace(self, moment=self.moment.clone())

    @property
    def count(self) -> int:
        """How many rows there were."""
        return self._seen


class Gathering:
    """Statistics in the making: of several values at once, where all are computed together."""

    def __init__(self) -> None:
        """Before the first batch."""
        self._found: Observed | None = None
        self._waiting, self._filled = torch.empty(0), 0

    def add(self, rows: torch.Tensor) -> None:
        """Count a batch of rows, ``[n, features]`` float32."""
        if self._found is None:
            self._found, self._waiting = Observed.nothing(rows.shape[-1]), torch.empty(_CHUNK_ROWS, rows.shape[-1])
        for start in range(0, len(rows), _CHUNK_ROWS):
            part = rows[start : start + _CHUNK_ROWS]
            fits = min(len(part), _CHUNK_ROWS - self._filled)
            self._waiting[self._filled : self._filled + fits] = part[:fits]
            self._filled += fits
            if self._filled == _CHUNK_ROWS:
                self._found._accumulate(self._waiting)
                self._filled = len(part) - fits
                self._waiting[: self._filled] = part[fits:]

    def done(self) -> Observed:
        """The statistics; at least one batch was counted."""
        assert self._found is not None
        if self._filled:
            self._found._accumulate(self._waiting[: self._filled])
        self._found._mirror()
        return self._found
