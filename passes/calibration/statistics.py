"""What is learnt of a value from calibration data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

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
        self.moment.addmm_(rows.T, rows)
        self.low, self.high = torch.minimum(self.low, rows.amin(0)), torch.maximum(self.high, rows.amax(0))
        self.rows = torch.cat((self.rows, rows[-self._seen % self._stride :: self._stride]))
        self._seen += len(rows)
        while len(self.rows) > _SAMPLE_ROWS:
            self.rows, self._stride = self.rows[::2].clone(), 2 * self._stride

    @classmethod
    def over(cls, batches: Iterable[torch.Tensor]) -> Observed:
        """Statistics over batches of rows, ``[n, features]`` float32 each; at least one batch."""
        found: Observed | None = None
        for rows in batches:
            found = found if found is not None else cls.nothing(rows.shape[-1])
            found.add(rows)
        assert found is not None
        return found

    def scaled(self, factors: torch.Tensor) -> Observed:
        """Statistics of the same rows with every feature multiplied by its factor, ``[features]``, positive."""
        moment = self.moment * factors * factors.unsqueeze(-1)
        return Observed(moment, self.low * factors, self.high * factors, self.rows * factors, self._stride, self._seen)

    @property
    def count(self) -> int:
        """How many rows there were."""
        return self._seen
