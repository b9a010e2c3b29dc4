"""A linear on a weight that is mostly zeros: a bit for every weight, and the values of those that are not zero.

Layout: ``mask`` has a row of bits for every output; column ``i`` is bit ``i % 8``, counted from the lowest, of byte
``i // 8``. A bit that is set says that the weight is stored. ``values`` holds what is stored, row after row and
column after column, and ``row_offsets`` where each row begins among them.

With ``format="float"`` values are the weights themselves, of a floating dtype. With ``"int8"`` and ``"int4"`` they are
the codes of :mod:`graphwright.ir.ops.quantization`, uint8; of two 4-bit codes the earlier lies in the low nibble. A
weight is then ``(code - zero point) · scale`` with a scale, and maybe a zero point, for each output and group of
columns. What is not stored is 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional

from graphwright.ir.ops.definition import OpDefinition
from graphwright.ir.ops.quantization import by_rows, check_vectors, pack, unpack

FORMATS = ("float", "int8", "int4")
_MOST = torch.iinfo(torch.int32).max


def bits_of(format: str) -> int:
    """Bits of a stored code: 8 or 4.

    Raises:
        ValueError: the format is none of :data:`FORMATS`, or has no codes.
    """
    if format not in ("int8", "int4"):
        raise ValueError(f"format {format!r} has no codes: {', '.join(FORMATS[1:])} have")
    return int(format.removeprefix("int"))


def pack_mask(stored: torch.Tensor) -> torch.Tensor:
    """``[out, in]`` bool as bits, uint8 ``[out, ceil(in / 8)]``; bits beyond ``in`` are 0."""
    rows, columns = stored.shape
    padded = functional.pad(stored.to(torch.uint8), (0, -columns % 8)).view(rows, -(-columns // 8), 8)
    places = torch.arange(8, dtype=torch.uint8, device=stored.device)
    return (padded << places).sum(-1, dtype=torch.uint8)


def unpack_mask(mask: torch.Tensor, columns: int) -> torch.Tensor:
    """The inverse of :func:`pack_mask`: bool ``[out, columns]``."""
    places = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (mask.unsqueeze(-1) >> places).bitwise_and_(1).flatten(1)[:, :columns].bool()


def compress(weight: torch.Tensor, stored: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mask, values and row offsets of a matrix.

    Args:
        weight: ``[out, in]``: floats, or codes as uint8.
        stored: bool ``[out, in]``, the weights to keep.

    Returns:
        ``mask``, ``values`` (of ``weight``'s dtype, one to an element) and ``row_offsets``, int32 ``[out + 1]``.

    Raises:
        ValueError: more values than an int32 counts.
    """
    counts = stored.sum(1)
    if int(counts.sum()) > _MOST:
        raise ValueError(
            f"a matrix of {int(counts.sum())} values that are not zero is too large; {_MOST} can be stored"
        )
    offsets = torch.zeros(len(weight) + 1, dtype=torch.int32, device=weight.device)
    offsets[1:] = counts.cumsum(0)
    return pack_mask(stored), weight[stored], offsets


def pack_codes(codes: torch.Tensor, format: str) -> torch.Tensor:
    """Codes, uint8 ``[n]``, as ``values`` of a format; an odd last 4-bit code has 0 beside it."""
    if bits_of(format) == 8:
        return codes
    whole = functional.pad(codes, (0, len(codes) % 2))
    return pack(whole.unsqueeze(0), 4, max(2, len(whole)), None).flatten()


def unpack_codes(values: torch.Tensor, format: str, count: int) -> torch.Tensor:
    """The inverse of :func:`pack_codes`: uint8 ``[count]``."""
    return values if bits_of(format) == 8 else unpack(values.view(1, 1, -1), 4).flatten()[:count]


def decompress(
    mask: torch.Tensor,
    values: torch.Tensor,
    row_offsets: torch.Tensor,
    scales: torch.Tensor | None,
    zero_points: torch.Tensor | None,
    format: str,
    group_size: int,
    columns: int,
    dtype: torch.dtype,
    rows: slice = slice(None),
) -> torch.Tensor:
    """The dense weight, ``[rows, columns]`` of ``dtype``; arguments as for :func:`linear_sparse`."""
    stored = unpack_mask(mask[rows], columns)
    start, stop, _ = rows.indices(len(mask))
    first, last = int(row_offsets[start]), int(row_offsets[stop])
    if format == "float":
        weight = torch.zeros(stored.shape, dtype=dtype, device=mask.device)
        return weight.masked_scatter_(stored, values[first:last].to(dtype))
    assert scales is not None
    codes = unpack_codes(values, format, int(row_offsets[-1]))[first:last].to(dtype)
    groups = torch.arange(columns, device=mask.device) // group_size
    zero = float(2 ** (bits_of(format) - 1))
    zeros = (
        zero_points[rows].to(dtype)[:, groups]
        if zero_points is not None
        else torch.full_like(stored, zero, dtype=dtype)
    )
    weight = zeros.masked_scatter(stored, codes) - zeros
    return weight * scales[rows].to(dtype)[:, groups]


def dense_codes(
    mask: torch.Tensor,
    values: torch.Tensor,
    offsets: torch.Tensor,
    zeros: torch.Tensor | None,
    format: str,
    group: int,
    columns: int,
) -> torch.Tensor:
    """All codes of a sparse weight, uint8 ``[out, columns]``; zero points where nothing is stored."""
    stored = unpack_mask(mask, columns)
    middle = torch.full(stored.shape, 2 ** (bits_of(format) - 1), dtype=torch.uint8, device=mask.device)
    groups = torch.arange(columns, device=mask.device) // group
    fill = middle if zeros is None else zeros[:, groups].contiguous()
    return fill.masked_scatter(stored, unpack_codes(values, format, int(offsets[-1])))


def linear_sparse(
    x: torch.Tensor,
    mask: torch.Tensor,
    values: torch.Tensor,
    row_offsets: torch.Tensor,
    scales: torch.Tensor | None,
    zero_points: torch.Tensor | None,
    bias: torch.Tensor | None,
    format: str,
    group_size: int,
) -> torch.Tensor:
    """``y = x Ŵᵀ + b`` with a weight stored as in :mod:`graphwright.ir.ops.sparse`.

    Args:
        x: ``[..., in]``, floating.
        mask: uint8 ``[out, ceil(in / 8)]``.
        values: floating ``[n]``, or codes: uint8 ``[n]`` for ``int8``, ``[ceil(n / 2)]`` for ``int4``.
        row_offsets: int32 ``[out + 1]``, from 0 to ``n``, never falling.
        scales: ``[out, ceil(in / group_size)]``, floating; ``None`` for ``float``.
        zero_points: uint8 like the scales, or ``None`` for ``2**(bits - 1)``.
        bias: ``[out]`` or ``None``.
        format: one of :data:`FORMATS`.
        group_size: columns to a group; 0 for ``float``.

    Returns:
        ``[..., out]`` of x's dtype, computed in float32 or wider. A zero of the weight is multiplied like any number:
        infinity and NaN in ``x`` reach every output of their row.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    rows, columns = x.to(wide), x.shape[-1]

    def product(piece: slice) -> torch.Tensor:
        operands = mask, values, row_offsets, scales, zero_points, format, group_size
        return functional.linear(rows, decompress(*operands, columns, wide, piece))

    result = by_rows(rows, product, len(mask), columns)
    return (result + bias.to(wide) if bias is not None else result).to(x.dtype)


def check_stored(x: torch.Tensor, mask: torch.Tensor, values: torch.Tensor, row_offsets: torch.Tensor) -> int:
    """How many outputs a sparse weight has that ``x`` is multiplied with.

    Raises:
        ValueError: its parts do not fit together, or not to ``x``.
    """
    outputs = row_offsets.shape[0] - 1
    expected = (outputs, -(-int(x.shape[-1]) // 8))
    if mask.dtype != torch.uint8 or tuple(mask.shape) != expected:
        raise ValueError(f"mask must be uint8 {list(expected)}, not {mask.dtype} {list(mask.shape)}")
    if row_offsets.dtype != torch.int32 or row_offsets.dim() != 1 or outputs < 0:
        raise ValueError(f"row_offsets must be an int32 vector, not {row_offsets.dtype} {list(row_offsets.shape)}")
    if values.dim() != 1:
        raise ValueError(f"values must be a vector, not {list(values.shape)}")
    return outputs


def _fake(
    x: torch.Tensor,
    mask: torch.Tensor,
    values: torch.Tensor,
    row_offsets: torch.Tensor,
    scales: torch.Tensor | None,
    zero_points: torch.Tensor | None,
    bias: torch.Tensor | None,
    format: str,
    group_size: int,
) -> torch.Tensor:
    if format not in FORMATS:
        raise ValueError(f"format {format!r} is not one of {', '.join(FORMATS)}")
    columns, outputs = int(x.shape[-1]), check_stored(x, mask, values, row_offsets)
    check_vectors(outputs, bias=bias)
    if format == "float":
        if scales is not None or zero_points is not None or group_size != 0:
            raise ValueError("values that are floats have no scales, zero points or groups")
        if not values.dtype.is_floating_point:
            raise ValueError(f"values must be floating, not {values.dtype}")
        return x.new_empty((*x.shape[:-1], outputs))
    if group_size < 1:
        raise ValueError(f"a group must have at least one column, not {group_size}")
    if values.dtype != torch.uint8:
        raise ValueError(f"codes must be uint8, not {values.dtype}")
    cells = (outputs, -(-columns // group_size))
    if scales is None or tuple(scales.shape) != cells:
        raise ValueError(f"scales must be {list(cells)}, not {None if scales is None else list(scales.shape)}")
    if zero_points is not None and (zero_points.dtype != torch.uint8 or tuple(zero_points.shape) != cells):
        raise ValueError(f"zero points must be uint8 {list(cells)}, not {zero_points.dtype} {list(zero_points.shape)}")
    return x.new_empty((*x.shape[:-1], outputs))


def _macs(arguments: Mapping[str, Any]) -> int:
    """Of the weights that are stored: zeros are no work."""
    count = int(arguments["values"][0]) * (2 if arguments["format"] == "int4" else 1)
    for size in arguments["x"][:-1]:
        count *= int(size)
    return count


LINEAR_SPARSE = OpDefinition(
    name="linear_sparse",
    schema=(
        "(Tensor x, Tensor mask, Tensor values, Tensor row_offsets, Tensor? scales, Tensor? zero_points, Tensor? bias, "
        "str format, int group_size) -> Tensor"
    ),
    reference=linear_sparse,
    fake=_fake,
    macs=_macs,
    differentiable=("x", "values", "bias"),
)
