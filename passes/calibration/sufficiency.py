"""Whether calibration data determines what is learnt from it."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch

from graphwright.ir.errors import InputError
from graphwright.passes.calibration.statistics import Observed

# With fewer rows than an eighth of the features, seven eighths of all directions are nothing but the damping, and
# rounding for the rest of them can be worse than rounding to nearest.
_LEAST_SHARE = 8


@dataclass
class Sufficiency:
    """Checks inputs of linears, and warns once.

    Attributes:
        of_methods: a rounding method will look at second moments, which needs about as many rows as features.
    """

    of_methods: bool
    _warned: bool = False

    def check(self, inputs: Observed, name: str) -> None:
        """Check what a weight was seen to be given.

        Raises:
            InputError: nothing but padding, NaN or infinity, or fewer rows than an eighth of the features where
                methods look at second moments. Below one row for each feature a ``UserWarning`` says so.
        """
        where, rows, features = f"the input of weight {name!r}", inputs.count, len(inputs.low)
        if rows == 0:
            raise InputError("has no rows on the calibration data", where=where, hint="is all of it padding?")
        if not bool(torch.isfinite(inputs.low).all() and torch.isfinite(inputs.high).all()):
            raise InputError("is NaN or infinite on the calibration data", where=where, hint="look at the batches")
        if not self.of_methods or rows >= features:
            return
        if rows * _LEAST_SHARE < features:
            raise InputError(
                f"the calibration data is too short: {rows} rows (tokens) for {features} features",
                where=where,
                hint=f"give {features} rows or more, leave it out with ignore=, or use rounding='nearest'",
            )
        if not self._warned:
            warnings.warn(
                f"the calibration data is short: {rows} rows (tokens) for the {features} input features of weight "
                f"{name!r}; with fewer rows than features, rounding is fitted to them too closely",
                UserWarning,
                stacklevel=2,
            )
        self._warned = True
