"""GPTQ: round the columns of a weight one by one, each time letting the columns still to come make up for the error.

Frantar, Ashkboos, Hoefler, Alistarh: GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers
(ICLR 2023), algorithm 1, with the scales of each group fitted when the group is reached.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from graphwright.ir.errors import InputError

# Columns whose updates are gathered before they reach the rest of the matrix: one large product instead of many small
# ones.
_BLOCK = 128

# (columns [out, group], importance [group]) -> scales [out], zero points [out]
FitGroup = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def gptq(
    weight: torch.Tensor,
    second_moment: torch.Tensor,
    *,
    bits: int,
    group_size: int,
    fit_group: FitGroup,
    damping: float = 0.01,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantise one weight so that ``X Wᵀ`` changes least.

    Args:
        weight: ``[out, in]``, floating.
        second_moment: ``[in, in]``, ``Σ x xᵀ`` over calibration tokens; any positive factor does not matter.
        bits: bits per code.
        group_size: columns that share a scale; the last group may be shorter.
        fit_group: chooses scales and zero points of one group of columns.
        damping: added to the diagonal, as a fraction of its mean.

    Returns:
        codes ``[out, in]`` uint8, scales and zero points ``[out, groups]`` float32; ``weight ≈ (code - zero point) *
        scale``.

    Raises:
        InputError: the second moment is not finite, of another size, or not positive even when damped.
    """
    rows, columns = weight.shape
    if second_moment.shape != (columns, columns):
        raise InputError(f"the second moment is {list(second_moment.shape)}, the weight {list(weight.shape)}")
    if not bool(torch.isfinite(second_moment).all()):
        raise InputError("the calibration inputs hold NaN or infinity", hint="check the calibration data")
    factor, diagonal = _inverse_factor(second_moment, damping)
    work = weight.detach().to(torch.float32).clone()
    codes = torch.empty(rows, columns, dtype=torch.uint8)
    groups = -(-columns // group_size)
    scales, zeros = torch.empty(rows, groups), torch.empty(rows, groups)
    highest = float(2**bits - 1)
    for start in range(0, columns, _BLOCK):
        stop = min(start + _BLOCK, columns)
        errors = torch.empty(rows, stop - start)
        for column in range(start, stop):
            group = column // group_size
            if column % group_size == 0:
                end = min(column + group_size, columns)
                ahead = _with_pending(work, errors, factor, start, column, end) if end > stop else work[:, column:end]
                scales[:, group], zeros[:, group] = fit_group(ahead, diagonal[column:end])
            scale, zero = scales[:, group], zeros[:, group]
            code = torch.clamp(torch.round(work[:, column] / scale) + zero, 0.0, highest)
            codes[:, column] = code.to(torch.uint8)
            error = (work[:, column] - (code - zero) * scale) / factor[column, column]
            errors[:, column - start] = error
            if column + 1 < stop:
                work[:, column + 1 : stop] -= torch.outer(error, factor[column, column + 1 : stop])
        if stop < columns:
            work[:, stop:] -= errors @ factor[start:stop, stop:]
    return codes, scales, zeros


def _with_pending(
    work: torch.Tensor, errors: torch.Tensor, factor: torch.Tensor, start: int, column: int, end: int
) -> torch.Tensor:
    """Columns of a group that reaches beyond the block, with the updates that the block has not passed on yet."""
    stop = start + errors.shape[1]
    beyond = work[:, stop:end] - errors[:, : column - start] @ factor[start:column, stop:end]
    return torch.cat((work[:, column:stop], beyond), dim=1)


def _inverse_factor(second_moment: torch.Tensor, damping: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Upper Cholesky factor of the inverse of the damped second moment, and its undamped diagonal.

    A column that calibration never reached has zeros there; with the damping it is rounded to nearest like any other.
    """
    moment = second_moment.to(torch.float64)
    diagonal = moment.diagonal().clone()
    mean = float(diagonal.mean())
    if mean <= 0.0:
        raise InputError("the calibration inputs of a linear are all zero", hint="check the calibration data")
    damped = moment / mean + damping * torch.eye(len(moment), dtype=torch.float64)
    lower, failed = torch.linalg.cholesky_ex(damped)
    if int(failed):
        raise InputError(
            "the calibration inputs do not determine the rounding (their second moment is singular)",
            hint="give more calibration data, or raise the damping",
        )
    inverse = torch.cholesky_inverse(lower)
    upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
    if int(failed):
        raise InputError("the second moment cannot be inverted", hint="raise the damping")
    return upper.to(torch.float32), (diagonal / mean).clamp_min(1e-8).to(torch.float32)
