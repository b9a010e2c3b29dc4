"""Rounding to a grid in floating point, with gradients: what quantisation-aware training puts before linears."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional

from graphwright.ir.ops.definition import OpDefinition


def fake_quantize(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, low: int, high: int, group_size: int
) -> torch.Tensor:
    """``s · (clip(⌊x / s⌉ + z, low, high) - z)``: the numbers that codes ``low`` to ``high`` stand for, as floats.

    Gradients, with ``Q`` the ends ``low - z`` and ``high - z`` (Esser et al. 2020, "Learned Step Size Quantization",
    eq. 3 and 5, section 2.2): for ``x`` that of the identity where ``x / s`` lies between the ends and 0 elsewhere
    (straight-through, Bengio et al. 2013); for ``s`` the sum of ``⌊x / s⌉ - x / s`` between the ends and of the end
    elsewhere, times ``1 / √(N (high - low) / 2)``, where ``N`` is how many elements of one row of ``x`` share the
    scale. The paper has the greatest code in place of ``(high - low) / 2``; for its signed codes that is the same but
    for half a step.

    Args:
        x: floating; ``[rows, columns]`` with a scale per group, of any shape ``[..., columns]`` with one for all.
        scale: floating, not 0: ``[rows, G]`` with ``G = ceil(columns / group_size)``, or ``[]`` for one for all.
        zero_point: integers of any dtype in the scale's shape; ``None`` for 0.
        low: least code.
        high: greatest code.
        group_size: columns to a scale; 0 for one for all.

    Returns:
        the shape and dtype of x. The quotient is taken in float64, so that the same codes are chosen whatever the dtype
        that the model is run in. NaN stays NaN.
    """
    values = x.double()
    step = scale.double()
    shared = group_size if group_size else max(1, x.shape[-1])
    factor = 1.0 / math.sqrt(max(1, shared) * max(high - low, 1) / 2)
    # The value is the scale, the gradient is damped: the difference is 0.
    step = step.detach() + (step - step.detach()) * factor
    zero: torch.Tensor | None = None if zero_point is None else zero_point.detach().double()
    columns = x.shape[-1]
    if group_size:
        values = functional.pad(values, (0, scale.shape[1] * group_size - columns))
        values = values.reshape(len(x), scale.shape[1], group_size)
        step = step.unsqueeze(-1)
        zero = zero.unsqueeze(-1) if zero is not None else None
    least = torch.full_like(step, low) if zero is None else low - zero
    most = torch.full_like(step, high) if zero is None else high - zero
    steps = values / step
    within = (steps > least) & (steps < most)
    steps = torch.where(within, steps, steps.detach().clamp(least, most))
    # In value the integer; the gradient is that of the quotient.
    whole = steps.detach().round() + (steps - steps.detach())
    found = whole * step
    if group_size:
        found = found.flatten(1)[:, :columns]
    return found.to(x.dtype).contiguous()


def codes_of(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, low: int, high: int, group_size: int
) -> torch.Tensor:
    """The codes that :func:`fake_quantize` rounds a matrix to, int16 ``[rows, columns]``."""
    steps = fake_quantize(x.double(), scale.double(), zero_point, low, high, group_size)
    columns = x.shape[-1]
    each = scale.double().repeat_interleave(group_size, dim=1)[:, :columns]
    codes = (steps / each).round()
    if zero_point is not None:
        codes += zero_point.double().repeat_interleave(group_size, dim=1)[:, :columns]
    return codes.to(torch.int16)


def _fake(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, low: int, high: int, group_size: int
) -> torch.Tensor:
    if not low < high:
        raise ValueError(f"codes go from {low} to {high}, which leaves nothing to choose")
    if group_size < 0:
        raise ValueError(f"the group size must be positive, or 0 for one scale for all, not {group_size}")
    expected: tuple[Any, ...] = ()
    if group_size:
        torch._check(x.dim() == 2, lambda: f"a scale per group is for matrices, not for {x.dim()} dimensions")
        expected = (x.shape[0], -(-x.shape[1] // group_size))
    torch._check(tuple(scale.shape) == expected, lambda: f"scale must be {list(expected)}, not {list(scale.shape)}")
    if zero_point is not None:
        torch._check(
            zero_point.shape == scale.shape,
            lambda: f"zero points must have the scale's shape {list(scale.shape)}, not {list(zero_point.shape)}",
        )
    return x.new_empty(x.shape)


def _macs(arguments: Mapping[str, Any]) -> int:
    return 0


FAKE_QUANTIZE = OpDefinition(
    name="fake_quantize",
    schema="(Tensor x, Tensor scale, Tensor? zero_point, int low, int high, int group_size) -> Tensor",
    reference=fake_quantize,
    fake=_fake,
    macs=_macs,
    differentiable=("x", "scale"),
)
