"""Linears on sparse INT8 weights whose activations are rounded to 8 bits.

Weights are stored as :mod:`graphwright.ir.ops.sparse` says, with one scale for each output; a value is the int8 weight
plus 128, so that 128 stands for zero as it does there. Activations are rounded as the dense linears of
:mod:`graphwright.ir.ops.quantization` round them, and results are theirs: the sums of products are exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from graphwright.ir.ops.definition import OpDefinition
from graphwright.ir.ops.quantization import (
    ACTIVATION_MODES,
    check_vectors,
    linear_int8_dynamic,
    linear_int8_static,
)
from graphwright.ir.ops.sparse import check_stored, unpack_mask


def stored_values(qweight: torch.Tensor) -> torch.Tensor:
    """int8 weights as values: uint8, 128 more."""
    return qweight.view(torch.uint8) ^ 128


def int8_weight(mask: torch.Tensor, values: torch.Tensor, columns: int) -> torch.Tensor:
    """The dense weight, int8 ``[out, columns]``."""
    stored = unpack_mask(mask, columns)
    weight = torch.zeros(stored.shape, dtype=torch.int8, device=mask.device)
    return weight.masked_scatter_(stored, (values ^ 128).view(torch.int8))


def linear_sparse_dynamic(
    x: torch.Tensor,
    mask: torch.Tensor,
    values: torch.Tensor,
    row_offsets: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
) -> torch.Tensor:
    """``y = x̂ Ŵᵀ + b`` with activations quantised on the fly to 8 bits and sparse INT8 weights.

    Args:
        x: ``[..., in]``, floating.
        mask: uint8 ``[out, ceil(in / 8)]``.
        values: uint8 ``[n]``, int8 weights plus 128.
        row_offsets: int32 ``[out + 1]``, from 0 to ``n``, never falling.
        scales: ``[out]``.
        bias: ``[out]`` or ``None``.
        activation: see :func:`graphwright.ir.ops.quantization.quantize_activations`.

    Returns:
        ``[..., out]`` of x's dtype: what
        :func:`graphwright.ir.ops.quantization.linear_int8_dynamic` gives on the dense weight.
    """
    return linear_int8_dynamic(x, int8_weight(mask, values, x.shape[-1]), scales, bias, activation)


def linear_sparse_static(
    x: torch.Tensor,
    mask: torch.Tensor,
    values: torch.Tensor,
    row_offsets: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    input_scales: torch.Tensor,
    input_zero_point: int,
) -> torch.Tensor:
    """``y = x̂ Ŵᵀ + b`` with activations quantised to 8 bits on a grid known beforehand and sparse INT8 weights.

    Args:
        x, mask, values, row_offsets, scales, bias: as for :func:`linear_sparse_dynamic`.
        input_scales: ``[in]``, positive.
        input_zero_point: code that stands for 0, in 0..255.

    Returns:
        ``[..., out]`` of x's dtype: what
        :func:`graphwright.ir.ops.quantization.linear_int8_static` gives on the dense weight.
    """
    return linear_int8_static(x, int8_weight(mask, values, x.shape[-1]), scales, bias, input_scales, input_zero_point)


def _dynamic_fake(
    x: torch.Tensor,
    mask: torch.Tensor,
    values: torch.Tensor,
    row_offsets: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
) -> torch.Tensor:
    if activation not in ACTIVATION_MODES:
        raise ValueError(f"activation {activation!r} is not one of {', '.join(ACTIVATION_MODES)}")
    outputs = check_stored(x, mask, values, row_offsets)
    if values.dtype != torch.uint8:
        raise ValueError(f"values must be uint8, not {values.dtype}")
    check_vectors(outputs, scales=scales, bias=bias)
    return x.new_empty((*x.shape[:-1], outputs))


def _static_fake(
    x: torch.Tensor,
    mask: torch.Tensor,
    values: torch.Tensor,
    row_offsets: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    input_scales: torch.Tensor,
    input_zero_point: int,
) -> torch.Tensor:
    if not 0 <= input_zero_point <= 255:
        raise ValueError(f"the input's zero point must be in 0..255, not {input_zero_point}")
    result = _dynamic_fake(x, mask, values, row_offsets, scales, bias, "per_tensor")
    check_vectors(int(x.shape[-1]), input_scales=input_scales)
    return result


def _macs(arguments: Mapping[str, Any]) -> int:
    """Of the weights that are stored: zeros are no work."""
    count = int(arguments["values"][0])
    for size in arguments["x"][:-1]:
        count *= int(size)
    return count


LINEAR_SPARSE_DYNAMIC = OpDefinition(
    name="linear_sparse_dynamic",
    schema=(
        "(Tensor x, Tensor mask, Tensor values, Tensor row_offsets, Tensor scales, Tensor? bias, str activation)"
        " -> Tensor"
    ),
    reference=linear_sparse_dynamic,
    fake=_dynamic_fake,
    macs=_macs,
    differentiable=("x", "bias"),
)

LINEAR_SPARSE_STATIC = OpDefinition(
    name="linear_sparse_static",
    schema=(
        "(Tensor x, Tensor mask, Tensor values, Tensor row_offsets, Tensor scales, Tensor? bias, Tensor input_scales,"
        " int input_zero_point) -> Tensor"
    ),
    reference=linear_sparse_static,
    fake=_static_fake,
    macs=_macs,
    differentiable=("x", "bias"),
)
