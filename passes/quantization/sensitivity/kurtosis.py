"""Kurtosis of inputs: linears whose inputs have the heaviest tails stay in floating point.

Kurtic et al. leave the linears with the highest kurtosis of the input (3 to 10 of 320 in Llama-2-7B) out of INT8.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from graphwright.ir.errors import InputError
from graphwright.passes.quantization.sensitivity.table import Sensitivities


def kurtosis(batches: Iterable[torch.Tensor]) -> float:
    """``E (x - m)⁴ / (E (x - m)²)²`` over all numbers of all batches of rows; 3 for normal ones."""
    sums = torch.zeros(5, dtype=torch.float64)
    for rows in batches:
        values = rows.to(torch.float64).flatten()
        squares = values.square()
        parts = (squares.sum(), squares @ values, squares @ squares)
        sums += torch.stack([torch.tensor(float(len(values)), dtype=torch.float64), values.sum(), *parts])
    if sums[0] == 0:
        return 0.0
    mean, second, third, fourth = (float(value) for value in sums[1:] / sums[0])
    variance = second - mean**2
    central = fourth - 4 * mean * third + 6 * mean**2 * second - 3 * mean**4
    return max(central, 0.0) / variance**2 if variance > 1e-12 * second else 0.0


def skip_by_kurtosis(
    sensitivities: Sensitivities, *, count: int | None = None, fraction: float | None = None
) -> dict[str, None]:
    """The linears whose inputs have the highest kurtosis, left in floating point.

    Args:
        sensitivities: a table made with calibration data; ``measure="kurtosis"`` is the quickest.
        count: how many weights.
        fraction: the same as a fraction of all, rounded up.

    Returns:
        overrides for :class:`QuantizeLinears`: ``{weight name: None}``.

    Raises:
        InputError: the table has no kurtosis, or not exactly one of ``count`` and ``fraction`` is given, in range.
    """
    rows = sensitivities.linears
    if any(row.kurtosis is None for row in rows):
        raise InputError("the table has no kurtosis of inputs", where="skip_by_kurtosis", hint="give calibration=")
    if (count is None) == (fraction is None):
        raise InputError("takes either count= or fraction=", where="skip_by_kurtosis")
    if fraction is not None and (isinstance(fraction, bool) or not 0 <= fraction <= 1):
        raise InputError(f"must lie between 0 and 1, not {fraction!r}", where="skip_by_kurtosis: fraction")
    wanted = count if count is not None else math.ceil(float(fraction or 0) * len(rows))
    if isinstance(wanted, bool) or not isinstance(wanted, int) or not 0 <= wanted <= len(rows):
        raise InputError(f"must lie between 0 and {len(rows)}, not {wanted!r}", where="skip_by_kurtosis: count")
    order = sorted(range(len(rows)), key=lambda index: (-(rows[index].kurtosis or 0.0), index))
    return {rows[index].weight: None for index in order[:wanted]}
