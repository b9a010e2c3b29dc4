"""From a float weight to packed codes, scales and zero points, in slices that fit the cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from graphwright.ir.errors import InputError
from graphwright.ir.mapped import release
from graphwright.ir.ops.codebook import dequantize_codebook
from graphwright.ir.ops.quantization import dequantize, pack
from graphwright.passes.quantization.finite import is_finite
from graphwright.passes.quantization.formats import Format
from graphwright.passes.quantization.loss import Loss
from graphwright.passes.quantization.rounding.base import Codes

# Elements worked on at once: temporaries of a slice stay in the cache, and its operations are long enough to be shared
# among threads.
_SLICE_ELEMENTS = 1 << 19


@dataclass(frozen=True)
class PackedWeight:
    """A quantised weight in the layout of :mod:`graphwright.ir.ops.quantization`, with what it cost."""

    qweight: torch.Tensor
    scales: torch.Tensor
    zero_points: torch.Tensor | None
    group_size: int
    loss: Loss
    form: Format
    columns: int

    def dense(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight it stands for, ``[rows, columns]``; computed in float32, of which no more than a slice is held."""
        rows = len(self.qweight)
        found = torch.empty(rows, self.columns, dtype=dtype)
        step = max(1, _SLICE_ELEMENTS // max(1, self.columns))
        for start in range(0, rows, step):
            found[start : start + step] = self._values(slice(start, start + step))
        return found

    def _values(self, piece: slice) -> torch.Tensor:
        codes, scales = self.qweight[piece], self.scales[piece]
        if self.form.codebook is not None:
            return dequantize_codebook(codes, scales, self.form.codebook, self.columns, torch.float32)
        zeros = self.zero_points[piece] if self.zero_points is not None else None
        return dequantize(codes, scales, zeros, self.form.bits, self.columns, torch.float32)


@dataclass(frozen=True)
class ChannelWeight:
    """A weight as int8 codes in ±127 ``[rows, columns]`` with one float32 scale per row, and what it cost."""

    qweight: torch.Tensor
    scales: torch.Tensor
    loss: Loss

    def dense(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight it stands for, ``[rows, columns]``; computed in float32."""
        return (self.qweight.to(torch.float32) * self.scales.unsqueeze(-1)).to(dtype)


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
    if not is_finite(weight):
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
        for span, block in _blocks(weight, group, form.block_rows):
            scales[span], zeros[span] = form.fit(block)
            # NaN and infinity reach the scales: the extremes they are made from take them over.
            if not bool(torch.isfinite(scales[span]).all()):
                raise _not_finite(name)
        stored, points, filling = form.stored(scales), _stored_zeros(zeros, form), _filling(zeros, form)
        loss = Loss()
        for span, block in _blocks(weight, group):
            scale, zero = stored[span].to(torch.float32), zeros[span]
            found = form.round(block, scale, zero)
            qweight[span] = pack(found.flatten(1).to(torch.uint8), form.bits, group, filling[span])
            loss.add(form.values(found, scale, zero), block)
    return PackedWeight(qweight, stored, points, group, loss, form, columns)


def _blocks(weight: torch.Tensor, group: int, multiple: int = 1) -> Iterator[tuple[tuple[slice, slice], torch.Tensor]]:
    """Slices of a weight in float32, cut into groups ``[rows, groups, group]``, each with the place of its groups.

    The last group of rows that do not divide comes by itself, shorter. A slice begins at a multiple of so many rows. Of
    a weight that is mapped from a file, no more than a slice is in memory.
    """
    rows, columns = weight.shape
    step = max(1, _SLICE_ELEMENTS // max(1, columns * multiple)) * multiple
    whole = columns // group
    for start in range(0, rows, step):
        down = slice(start, min(start + step, rows))
        piece = weight[down].detach().to(torch.float32)
        if whole:
            yield (down, slice(0, whole)), piece[:, : whole * group].reshape(len(piece), whole, group)
        if whole * group < columns:
            yield (down, slice(whole, whole + 1)), piece[:, whole * group :].unsqueeze(1)
        release(weight[down])


def pack_codes(found: Codes, form: Format) -> PackedWeight | ChannelWeight:
    """Pack what a rounding method chose."""
    if form.integer_products:
        steps = (found.codes.to(torch.int16) - 2 ** (form.bits - 1)).to(torch.int8)
        return ChannelWeight(steps, found.scales.squeeze(1), found.loss)
    columns = found.codes.shape[1]
    group, points = form.columns_per_group(columns), _stored_zeros(found.zeros, form)
    qweight = pack(found.codes, form.bits, group, _filling(found.zeros, form))
    return PackedWeight(qweight, form.stored(found.scales), points, group, found.loss, form, columns)


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
    form = Format(8, None, True, clip_search, integer_products=True)
    codes, scales, loss = torch.empty(rows, columns, dtype=torch.int8), torch.empty(rows), Loss()
    with torch.no_grad():
        for (down, _), block in _blocks(weight, columns):
            piece = block.squeeze(1)
            scale, zero = form.fit(piece)
            if not bool(torch.isfinite(scale).all()):
                raise _not_finite(name)
            scales[down] = scale
            found = form.round(piece, scale, zero)
            codes[down] = found.sub(zero.unsqueeze(-1)).to(torch.int8)
            loss.add(form.values(found, scale, zero), piece)
    return ChannelWeight(codes, scales, loss)


def _stored_zeros(zeros: torch.Tensor, form: Format) -> torch.Tensor | None:
    return None if form.symmetric or form.codebook is not None else form.stored_zeros(zeros)


def _filling(zeros: torch.Tensor, form: Format) -> torch.Tensor:
    """The codes that fill up the last group: zero points, or those next to them."""
    return zeros.round().clamp(0, 2**form.bits - 1).to(torch.uint8)
