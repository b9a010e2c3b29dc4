"""Coordinate descent on codes and scales: what is left to gain once every column has been rounded.

One column after another, the code is chosen that is best with all other columns as they are: for ``E = W - Ŵ`` and
``G = E H`` the error ``tr E H Eᵀ`` is least at ``ŵ_j + G_j / H_jj`` (Behdin et al. 2023, QuantEase, equation 8). Before
its columns, each group's scale is set to the best one for the codes it has: ``s + cᵀ G / cᵀ H c``, ``c`` being what the
codes stand for at scale 1. No step makes the error larger, except that scales are rounded to how they are stored.
"""

from __future__ import annotations

import torch

from graphwright.passes.quantization.formats import Format
from graphwright.passes.quantization.rounding.base import Codes

# Columns whose changes are passed on one by one; beyond them by products of matrices.
_FEW = 32


def dense(found: Codes, form: Format, rows: slice = slice(None)) -> torch.Tensor:
    """What codes stand for, float32 ``[rows, columns]``."""
    codes = found.codes[rows]
    group = form.columns_per_group(codes.shape[1])
    result = torch.empty(codes.shape)
    for index in range(found.scales.shape[1]):
        own = slice(index * group, (index + 1) * group)
        scale, zero = found.scales[rows, index], found.zeros[rows, index]
        result[:, own] = form.values(codes[:, own].to(torch.float32), scale, zero)
    return result


def descend(
    weight: torch.Tensor,
    second_moment: torch.Tensor,
    found: Codes,
    form: Format,
    *,
    sweeps: int,
    damping: float,
    kept: torch.Tensor | None = None,
) -> Codes:
    """Improve codes and scales; zero points stay.

    Args:
        weight: ``[out, in]``, floating.
        second_moment: ``[in, in]``.
        found: where to start.
        form: the format.
        sweeps: how often to go over all columns.
        damping: added to the diagonal, as a fraction of its mean.
        kept: which weights do not have to be 0, bool ``[out, in]``; ``None`` for all.
    """
    codes, scales = found.codes.clone(), found.scales.clone()
    group_size = form.columns_per_group(weight.shape[1])
    extra = damping * float(second_moment.diagonal().to(torch.float64).mean())
    errors = weight.detach().to(torch.float32) - dense(found, form)
    for _ in range(sweeps):
        for group in range(scales.shape[1]):
            own = slice(group * group_size, (group + 1) * group_size)
            # Of the group alone, with columns as rows, so that each is one stretch of memory.
            moment = second_moment[own, own].to(torch.float32, copy=True)
            moment.diagonal().add_(extra)
            error = errors[:, own].t().contiguous()
            gradient = (errors @ second_moment[:, own].to(torch.float32)).t().contiguous().add_(error, alpha=extra)
            state = codes[:, own].t().to(torch.float32)
            scale, zero = scales[:, group], found.zeros[:, group]
            scale = _refit(state, scale, zero, error, gradient, moment, form)
            free = kept[:, own].t() if kept is not None else None
            _improve(state, scale, zero, error, gradient, moment, form, free)
            codes[:, own], scales[:, group], errors[:, own] = state.t().to(torch.uint8), scale, error.t()
    return Codes(codes, scales, found.zeros)


def _refit(
    state: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    error: torch.Tensor,
    gradient: torch.Tensor,
    moment: torch.Tensor,
    form: Format,
) -> torch.Tensor:
    """The best scale for the codes; errors and gradient (``[columns, rows]``) follow it."""
    units = form.values(state.t(), torch.ones_like(scale), zero).t()
    weighted = moment @ units
    size = (units * weighted).sum(0)
    step = torch.where(size > 0, (units * gradient).sum(0) / size.clamp_min(torch.finfo(torch.float32).tiny), 0.0)
    better = form.stored(scale + step).to(torch.float32)
    better = torch.where(better * scale > 0, better, scale)  # a scale of 0, or of the other sign, is none
    change = better - scale
    error.sub_(units * change)
    gradient.sub_(weighted.mul_(change))
    return better


def _improve(
    state: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    error: torch.Tensor,
    gradient: torch.Tensor,
    moment: torch.Tensor,
    form: Format,
    kept: torch.Tensor | None,
) -> None:
    """One pass over the columns; everything but the scale is changed in place."""
    diagonal = moment.diagonal().tolist()
    count = len(state)
    for begin in range(0, count, _FEW):
        end = min(begin + _FEW, count)
        changes = torch.empty_like(error[begin:end])
        for place in range(begin, end):
            value = form.values(state[place].unsqueeze(-1), scale, zero).squeeze(-1)
            code = form.round(torch.add(value, gradient[place], alpha=1 / diagonal[place]).unsqueeze(-1), scale, zero)
            if kept is not None:
                code = torch.where(kept[place].unsqueeze(-1), code, zero.unsqueeze(-1))
            change = form.values(code, scale, zero).squeeze(-1).sub_(value)
            state[place] = code.squeeze(-1)
            changes[place - begin] = change
            gradient[place:end].addr_(moment[place, place:end], change, alpha=-1)
        error[begin:end] -= changes
        if end < count:
            gradient[end:].addmm_(moment[begin:end, end:].t(), changes, alpha=-1)
