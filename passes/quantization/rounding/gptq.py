"""GPTQ: round the columns of a weight one by one, each time letting the columns still to come make up for the error.

Frantar, Ashkboos, Hoefler, Alistarh: GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers
(ICLR 2023), algorithm 1, with the scales of each group fitted when the group is reached.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from graphwright.ir.errors import InputError
from graphwright.passes.calibration import Observed
from graphwright.passes.quantization.formats import Format
from graphwright.passes.quantization.loss import Loss
from graphwright.passes.quantization.rounding.base import Codes, InputRounding

# Columns whose updates are gathered before they reach the rest of the matrix: one large product instead of many small
# ones.
_BLOCK = 128


@dataclass(frozen=True)
class Gptq(InputRounding):
    """GPTQ (Frantar et al. 2023).

    Attributes:
        damping: added to the second moments' diagonal, as a fraction of its mean.
    """

    method: ClassVar[str] = "gptq"
    damping: float = 0.01

    def __post_init__(self) -> None:
        if not 0.0 < self.damping < 10.0:
            raise InputError(f"must be above 0, not {self.damping!r}", where="gptq: damping")

    def codes(self, weight: torch.Tensor, form: Format, inputs: Observed) -> Codes:
        """See :func:`gptq`."""
        return gptq(weight, inputs.moment, form, damping=self.damping)


def gptq(weight: torch.Tensor, second_moment: torch.Tensor, form: Format, *, damping: float = 0.01) -> Codes:
    """Quantise one weight so that ``X Wᵀ`` changes least.

    Args:
        weight: ``[out, in]``, floating.
        second_moment: ``[in, in]``, ``Σ x xᵀ`` over calibration tokens; any positive factor does not matter.
        form: the format; its grids are fitted when their group is reached.
        damping: added to the diagonal, as a fraction of its mean.

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
    rounded = torch.empty_like(work)
    codes = torch.empty(rows, columns, dtype=torch.uint8)
    group_size = form.columns_per_group(columns)
    groups = -(-columns // group_size)
    scales, zeros = torch.empty(rows, groups), torch.empty(rows, groups)
    for start in range(0, columns, _BLOCK):
        stop = min(start + _BLOCK, columns)
        errors = torch.empty(rows, stop - start)
        for column in range(start, stop):
            group = column // group_size
            if column % group_size == 0:
                end = min(column + group_size, columns)
                ahead = _with_pending(work, errors, factor, start, column, end) if end > stop else work[:, column:end]
                scales[:, group], zeros[:, group] = form.fit(ahead, diagonal[column:end])
            scale, zero = scales[:, group], zeros[:, group]
            code = form.round(work[:, column : column + 1], scale, zero)
            value = form.values(code, scale, zero).squeeze(1)
            codes[:, column], rounded[:, column] = code.squeeze(1).to(torch.uint8), value
            error = (work[:, column] - value) / factor[column, column]
            errors[:, column - start] = error
            if column + 1 < stop:
                work[:, column + 1 : stop] -= torch.outer(error, factor[column, column + 1 : stop])
        if stop < columns:
            work[:, stop:] -= errors @ factor[start:stop, stop:]
    return Codes(codes, scales, zeros, Loss.of_outputs(rounded, weight.detach(), second_moment))


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
