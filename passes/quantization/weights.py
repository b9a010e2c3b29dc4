"""From a float weight to packed codes, scales and zero points, in slices that fit the cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from graphwright.ir.errors import InputError
from graphwright.ir.mapped import release
from graphwright.ir.ops.quantization import pack
from graphwright.passes.quantization.gptq import FitGroup, gptq
from graphwright.passes.quantization.grids import fit_grid, round_to_grid
from graphwright.passes.quantization.loss import Loss

# Elements worked on at once: temporaries of a slice stay in the cache, and its operations are long enough to be shared
# among threads.
_SLICE_ELEMENTS = 1 << 19

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
    """A quantised weight in the layout of :mod:`graphwright.ir.ops.quantization`, with what it cost."""

    qweight: torch.Tensor
    scales: torch.Tensor
    zero_points: torch.Tensor | None
    group_size: int
    loss: Loss


@dataclass(frozen=True)
class ChannelWeight:
    """A weight as int8 codes in ±127 ``[rows, columns]`` with one float32 scale per row, and what it cost."""

    qweight: torch.Tensor
    scales: torch.Tensor
    loss: Loss


def _not_finite(name: str) -> InputError:
    return InputError(
        "holds NaN or infinity and cannot be quantised",
        where=f"weight {name!r}",
        hint="repair the checkpoint, or leave the layer out with ignore=",
    )


def check_finite(weight: torch.Tensor, name: str) -> None:
    """Check a weight that is read as a whole.

    Raises:
        InputError: it holds NaN or infinity.
    """
    if not bool(torch.isfinite(weight).all()):
        raise _not_finite(name)


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
    # What stays is allocated first, and what does not is of a slice's size: many weights leave no holes in memory.
    qweight = torch.empty(rows, groups, group * form.bits // 8, dtype=torch.uint8)
    scales, zeros = torch.empty(rows, groups), torch.empty(rows, groups)
    with torch.no_grad():
        for span, block in _blocks(weight, group):
            scales[span], zeros[span] = fit_grid(
                block, bits=form.bits, symmetric=form.symmetric, clip_search=form.clip_search
            )
            # NaN and infinity reach the scales: the extremes they are made from take them over.
            if not bool(torch.isfinite(scales[span]).all()):
                raise _not_finite(name)
        stored, points = _stored_scales(scales), _stored_zeros(zeros, form)
        loss = Loss()
        for span, block in _blocks(weight, group):
            scale, zero = stored[span].to(torch.float32), zeros[span]
            found = round_to_grid(block, scale, zero, form.bits)
            padding = points[span] if points is not None else None
            qweight[span] = pack(found.flatten(1).to(torch.uint8), form.bits, group, padding)
            loss.add(found.sub_(zero.unsqueeze(-1)).mul_(scale.unsqueeze(-1)), block)
    return PackedWeight(qweight, stored, points, group, loss)


def _blocks(weight: torch.Tensor, group: int) -> Iterator[tuple[tuple[slice, slice], torch.Tensor]]:
    """Slices of a weight in float32, cut into groups ``[rows, groups, group]``, each with the place of its groups.

    The last group of rows that do not divide comes by itself, shorter. Of a weight that is mapped from a file, no more
    than a slice is in memory.
    """
    rows, columns = weight.shape
    step = max(1, _SLICE_ELEMENTS // max(1, columns))
    whole = columns // group
    for start in range(0, rows, step):
        down = slice(start, min(start + step, rows))
        piece = weight[down].detach().to(torch.float32)
        if whole:
            yield (down, slice(0, whole)), piece[:, : whole * group].reshape(len(piece), whole, group)
        if whole * group < columns:
            yield (down, slice(whole, whole + 1)), piece[:, whole * group :].unsqueeze(1)
        release(weight[down])


def quantize_weight_gptq(
    weight: torch.Tensor, second_moment: torch.Tensor, form: Format, *, damping: float, name: str = "weight"
) -> PackedWeight:
    """Quantise a weight with GPTQ; see :func:`graphwright.passes.quantization.gptq.gptq`.

    Raises:
        InputError: the weight or the second moment holds NaN or infinity, or the latter is singular.
    """
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

    codes, scales, zeros = _gptq(weight, second_moment, form.bits, group, fit, damping, name)
    stored, group_of = _stored_scales(scales), torch.arange(weight.shape[1]) // group
    rounded = (codes - zeros[:, group_of]) * stored.to(torch.float32)[:, group_of]
    loss, points = Loss.of_outputs(rounded, weight.detach(), second_moment), _stored_zeros(zeros, form)
    return PackedWeight(pack(codes, form.bits, group, points), stored, points, group, loss)


def _gptq(
    weight: torch.Tensor,
    second_moment: torch.Tensor,
    bits: int,
    group_size: int,
    fit: FitGroup,
    damping: float,
    name: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    check_finite(weight, name)
    try:
        return gptq(weight, second_moment, bits=bits, group_size=group_size, fit_group=fit, damping=damping)
    except InputError as error:
        raise InputError(error.what, where=f"weight {name!r}", hint=error.hint) from error


def quantize_weight_int8(weight: torch.Tensor, *, clip_search: bool, name: str = "weight") -> ChannelWeight:
    """Symmetric INT8 per row, for integer products with quantised activations.

    Args:
        weight: ``[rows, columns]``, floating.
        clip_search: look for the range with the least squared error.
        name: for messages.

    Raises:
        InputError: the weight holds NaN or infinity.
    """
    rows, columns = weight.shape
    codes, scales, loss = torch.empty(rows, columns, dtype=torch.int8), torch.empty(rows), Loss()
    with torch.no_grad():
        for (down, _), block in _blocks(weight, columns):
            piece = block.squeeze(1)
            scale, zero = fit_grid(piece, bits=8, symmetric=True, clip_search=clip_search, full_range=False)
            if not bool(torch.isfinite(scale).all()):
                raise _not_finite(name)
            scales[down] = scale
            found = round_to_grid(piece, scale, zero, 8, lowest=1.0).sub_(zero.unsqueeze(-1))
            codes[down] = found.to(torch.int8)
            loss.add(found.mul_(scale.unsqueeze(-1)), piece)
    return ChannelWeight(codes, scales, loss)


def quantize_weight_int8_gptq(
    weight: torch.Tensor, second_moment: torch.Tensor, *, clip_search: bool, damping: float, name: str = "weight"
) -> ChannelWeight:
    """As :func:`quantize_weight_int8`, rounded by GPTQ.

    Raises:
        InputError: the weight or the second moment holds NaN or infinity, or the latter is singular.
    """

    def fit(columns: torch.Tensor, importance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return fit_grid(
            columns.contiguous(),
            bits=8,
            symmetric=True,
            clip_search=clip_search,
            importance=importance,
            full_range=False,
        )

    codes, scales, _ = _gptq(weight, second_moment, 8, weight.shape[1], fit, damping, name)
    steps = (codes.to(torch.int16) - 128).clamp_(-127, 127)
    loss = Loss.of_outputs(steps * scales, weight.detach(), second_moment)
    return ChannelWeight(steps.to(torch.int8), scales.squeeze(1), loss)


def _stored_scales(scales: torch.Tensor) -> torch.Tensor:
    size = scales.abs()
    fits = bool(((size >= _HALF.tiny) & (size <= _HALF.max)).all())
    return scales.to(torch.float16) if fits else scales


def _stored_zeros(zeros: torch.Tensor, form: Format) -> torch.Tensor | None:
    return None if form.symmetric else zeros.to(torch.uint8)
