"""From a float weight to packed codes, scales and zero points, in slices that fit the cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from graphwright.ir.errors import InputError
from graphwright.ir.ops.quantization import pack
from graphwright.passes.quantization.gptq import gptq
from graphwright.passes.quantization.grids import fit_grid, round_to_grid

# Elements worked on at once: the temporaries of a slice stay in a core's cache.
_SLICE_ELEMENTS = 1 << 18

# Scales are stored in half precision where all of them are normal numbers there.
_HALF = torch.finfo(torch.float16)


@dataclass(frozen=True)
class Format:
    """How weights are stored.

    Attributes:
        bits: 4 or 8.
        group_size: columns to a scale; ``None`` for one scale per row (output channel).
        symmetric: zero point fixed at the middle code, and not stored.
        clip_search: look for the range with the least squared error.
    """

    bits: int
    group_size: int | None
    symmetric: bool
    clip_search: bool

    def columns_per_group(self, columns: int) -> int:
        """The group size for a weight of so many columns; even, so that 4-bit codes pair up."""
        size = columns if self.group_size is None else self.group_size
        return size + size % 2


@dataclass(frozen=True)
class PackedWeight:
    """A quantised weight in the layout of :mod:`graphwright.ir.ops.quantization`."""

    qweight: torch.Tensor
    scales: torch.Tensor
    zero_points: torch.Tensor | None
    group_size: int


def check_finite(weight: torch.Tensor, name: str) -> None:
    """Refuse a weight no grid can hold.

    Raises:
        InputError: it holds NaN or infinity.
    """
    if not bool(torch.isfinite(weight).all()):
        raise InputError("holds NaN or infinity and cannot be quantised", where=f"weight {name!r}")


def quantize_weight(weight: torch.Tensor, form: Format, *, name: str = "weight") -> PackedWeight:
    """Quantise a weight to the nearest grid points.

    Args:
        weight: ``[rows, columns]``, floating, on the CPU.
        form: the storage format.
        name: for messages.

    Raises:
        InputError: the weight holds NaN or infinity.
    """
    rows, columns = weight.shape
    group = form.columns_per_group(columns)
    groups = -(-columns // group)
    codes = torch.empty(rows, columns, dtype=torch.uint8)
    scales, zeros = torch.empty(rows, groups), torch.empty(rows, groups)
    step = max(1, _SLICE_ELEMENTS // max(1, columns))
    whole = columns // group
    with torch.no_grad():
        for start in range(0, rows, step):
            piece = weight[start : start + step].detach().to(torch.float32)
            check_finite(piece, name)
            spans = [(0, whole)] if whole else []
            spans += [(whole, groups)] if whole < groups else []
            for first, last in spans:
                left, right = first * group, min(last * group, columns)
                block = piece[:, left:right].reshape(len(piece), last - first, -1)
                fitted, zero = fit_grid(block, bits=form.bits, symmetric=form.symmetric, clip_search=form.clip_search)
                scales[start : start + step, first:last], zeros[start : start + step, first:last] = fitted, zero
    stored = _stored_scales(scales)
    with torch.no_grad():
        for start in range(0, rows, step):
            piece = weight[start : start + step].detach().to(torch.float32)
            for first, last in [(0, whole), (whole, groups)]:
                if first == last:
                    continue
                left, right = first * group, min(last * group, columns)
                block = piece[:, left:right].reshape(len(piece), last - first, -1)
                span = (slice(start, start + step), slice(first, last))
                found = round_to_grid(block, stored[span].to(torch.float32), zeros[span], form.bits)
                codes[start : start + step, left:right] = found.reshape(len(piece), -1)
    return _packed(codes, stored, zeros, form, group)


def quantize_weight_gptq(
    weight: torch.Tensor, second_moment: torch.Tensor, form: Format, *, damping: float, name: str = "weight"
) -> PackedWeight:
    """Quantise a weight with GPTQ; see :func:`graphwright.passes.quantization.gptq.gptq`.

    Raises:
        InputError: the weight or the second moment holds NaN or infinity, or the latter is singular.
    """
    check_finite(weight, name)
    group = form.columns_per_group(weight.shape[1])

    def fit(columns: torch.Tensor, importance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scale, zero = fit_grid(
            columns.contiguous(),
            bits=form.bits,
            symmetric=form.symmetric,
            clip_search=form.clip_search,
            importance=importance,
        )
        return _stored_scales(scale).to(torch.float32), zero

    try:
        codes, scales, zeros = gptq(
            weight, second_moment, bits=form.bits, group_size=group, fit_group=fit, damping=damping
        )
    except InputError as error:
        raise InputError(error.what, where=f"weight {name!r}", hint=error.hint) from error
    return _packed(codes, _stored_scales(scales), zeros, form, group)


def quantize_weight_int8(
    weight: torch.Tensor, *, clip_search: bool, name: str = "weight"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric INT8 per row, for integer products with quantised activations.

    Args:
        weight: ``[rows, columns]``, floating.
        clip_search: look for the range with the least squared error.
        name: for messages.

    Returns:
        int8 codes in ±127 ``[rows, columns]`` and float32 scales ``[rows]``.

    Raises:
        InputError: the weight holds NaN or infinity.
    """
    rows, columns = weight.shape
    codes, scales = torch.empty(rows, columns, dtype=torch.int8), torch.empty(rows)
    step = max(1, _SLICE_ELEMENTS // max(1, columns))
    with torch.no_grad():
        for start in range(0, rows, step):
            piece = weight[start : start + step].detach().to(torch.float32)
            check_finite(piece, name)
            scale, _ = fit_grid(piece, bits=8, symmetric=True, clip_search=clip_search, full_range=False)
            scales[start : start + step] = scale
            steps = torch.round(piece / scale.unsqueeze(-1)).clamp_(-127, 127)
            codes[start : start + step] = steps.to(torch.int8)
    return codes, scales


def quantize_weight_int8_gptq(
    weight: torch.Tensor, second_moment: torch.Tensor, clip_search: bool, *, damping: float, name: str = "weight"
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`quantize_weight_int8`, rounded by GPTQ.

    Raises:
        InputError: the weight or the second moment holds NaN or infinity, or the latter is singular.
    """
    check_finite(weight, name)

    def fit(columns: torch.Tensor, importance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return fit_grid(
            columns.contiguous(),
            bits=8,
            symmetric=True,
            clip_search=clip_search,
            importance=importance,
            full_range=False,
        )

    try:
        codes, scales, _ = gptq(
            weight, second_moment, bits=8, group_size=weight.shape[1], fit_group=fit, damping=damping
        )
    except InputError as error:
        raise InputError(error.what, where=f"weight {name!r}", hint=error.hint) from error
    return (codes.to(torch.int16) - 128).clamp_(-127, 127).to(torch.int8), scales.squeeze(1)


def _stored_scales(scales: torch.Tensor) -> torch.Tensor:
    size = scales.abs()
    fits = bool(((size >= _HALF.tiny) & (size <= _HALF.max)).all())
    return scales.to(torch.float16) if fits else scales


def _packed(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, form: Format, group: int) -> PackedWeight:
    zero_points = None if form.symmetric else zeros.to(torch.uint8)
    return PackedWeight(pack(codes, form.bits, group, zero_points), scales, zero_points, group)
