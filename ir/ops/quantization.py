"""Quantised linears and embeddings, and the packed layout their weights are stored in.

Layout (``linear_nbits``, ``embedding_nbits``, ``linear_codebook``): rows are cut into ``G = ceil(in / group_size)``
groups along the input dimension. A group is a little-endian stream of bits: column ``i`` of it lies in bits
``[i · bits, (i + 1) · bits)``, counted from the lowest bit of its first byte. So an 8-bit code is a byte; of two 4-bit
codes the even column lies in the low nibble; four 2-bit codes share a byte and eight 3-bit codes three bytes. A group
fills whole bytes. The last group is padded with its zero point, which stands for exactly 0. A weight is
``(code - zero point) · scale``. Zero points are codes; those of ``linear_nbits`` may be floats as well, between codes,
and padding then stands for nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn import functional

from graphwright.ir.ops.definition import OpDefinition

BITS = (2, 3, 4, 8)
ACTIVATION_MODES = ("per_token", "per_tensor")

# Weights are dequantised in slices of at most this many elements: no float copy of a large layer ever exists, and a
# slice is still in the cache when it is multiplied.
_SLICE_ELEMENTS = 1 << 19


def codes_per_unit(bits: int) -> int:
    """The fewest codes that fill whole bytes: 4, 8, 2 and 1 of 2, 3, 4 and 8 bits."""
    return 8 // math.gcd(bits, 8)


def pack(codes: torch.Tensor, bits: int, group_size: int, zero_points: torch.Tensor | None) -> torch.Tensor:
    """Codes in the packed layout.

    Args:
        codes: uint8 ``[rows, columns]``, each below ``2**bits``.
        bits: 2, 3, 4 or 8.
        group_size: columns to a group; a multiple of :func:`codes_per_unit`.
        zero_points: uint8 ``[rows, G]``, or ``None`` for ``2**(bits - 1)``.

    Returns:
        uint8 ``[rows, G, group_size * bits / 8]``.
    """
    rows, columns = codes.shape
    groups = -(-columns // group_size)
    if groups * group_size != columns:
        padding = groups * group_size - columns
        fill = zero_points[:, -1:] if zero_points is not None else codes.new_full((rows, 1), 2 ** (bits - 1))
        codes = torch.cat((codes, fill.expand(rows, padding)), dim=1)
    if bits == 8:
        return codes.reshape(rows, groups, group_size).contiguous()
    unit = codes_per_unit(bits)
    units = codes.reshape(rows, groups, group_size // unit, unit)
    octets = codes.new_zeros(*units.shape[:-1], unit * bits // 8)
    for column, (octet, shift, spills) in enumerate(_places(bits)):
        code = units[..., column]
        octets[..., octet] |= code << shift
        if spills:
            octets[..., octet + 1] |= code >> (8 - shift)
    return octets.flatten(2)


def unpack(qweight: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes of packed weights, uint8 ``[rows, G, group_size]``; the inverse of :func:`pack`, padding included."""
    return qweight if bits == 8 else _unpack_as(qweight, bits, torch.uint8)


def widened(qweight: torch.Tensor, bits: int, *, symmetric: bool) -> torch.Tensor:
    """Packed codes of 2 or 3 bits as codes of 4 that stand for the same weights.

    Without zero points every code is moved so that the middle of 4 bits is 0; zero points stay as they are.
    """
    codes = unpack(qweight, bits)
    if symmetric:
        codes = codes + (8 - 2 ** (bits - 1))
    rows, groups, size = codes.shape
    return pack(codes.reshape(rows, groups * size), 4, size, None)


def _places(bits: int) -> list[tuple[int, int, bool]]:
    """Where each code of a unit lies: its first byte, the lowest bit there, and whether it goes on in the next byte."""
    starts = [column * bits for column in range(codes_per_unit(bits))]
    return [(start // 8, start % 8, start % 8 + bits > 8) for start in starts]


def dequantize(
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor | None,
    bits: int,
    columns: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The weight that packed codes stand for, ``[rows, columns]`` of ``dtype``: ``(code - zero point) · scale``."""
    values = _unpack_as(qweight, bits, dtype)
    values -= float(2 ** (bits - 1)) if zero_points is None else zero_points.to(dtype).unsqueeze(-1)
    values *= scales.to(dtype).unsqueeze(-1)
    return values.flatten(1)[:, :columns]


def _unpack_as(qweight: torch.Tensor, bits: int, dtype: torch.dtype) -> torch.Tensor:
    """Codes in ``dtype``, a tensor of its own; each code is converted on its way to its place."""
    if bits == 8:
        return qweight.to(dtype, copy=True)
    unit = codes_per_unit(bits)
    octets = qweight.unflatten(-1, (-1, unit * bits // 8))
    codes = torch.empty(*octets.shape[:-1], unit, dtype=dtype, device=qweight.device)
    for column, (octet, shift, spills) in enumerate(_places(bits)):
        code = octets[..., octet] >> shift
        if spills:
            code |= octets[..., octet + 1] << (8 - shift)
        codes[..., column] = code.bitwise_and_(2**bits - 1)
    return codes.flatten(-2)


def linear_nbits(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
    group_size: int,
) -> torch.Tensor:
    """``y = x Ŵᵀ + b`` with ``Ŵ = (code - zero point) · scale``: stored as integers, computed in floating point.

    Args:
        x: ``[..., in]``, floating.
        qweight: packed codes, uint8 ``[out, G, group_size * bits / 8]``.
        scales: ``[out, G]``, floating.
        zero_points: uint8 or floating ``[out, G]``, or ``None`` for ``2**(bits - 1)`` (symmetric).
        bias: ``[out]`` or ``None``.
        bits: 2, 3, 4 or 8.
        group_size: columns to a group.

    Returns:
        ``[..., out]`` of x's dtype, computed in float32 or wider.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    values, columns = x.to(wide), x.shape[-1]

    def product(piece: slice) -> torch.Tensor:
        zero = zero_points[piece] if zero_points is not None else None
        return functional.linear(values, dequantize(qweight[piece], scales[piece], zero, bits, columns, wide))

    result = by_rows(values, product, len(qweight), qweight.shape[1] * group_size)
    return (result + bias.to(wide) if bias is not None else result).to(x.dtype)


def by_rows(x: torch.Tensor, product: Callable[[slice], torch.Tensor], rows: int, columns: int) -> torch.Tensor:
    """``[..., rows]`` from the products of ``x`` with slices of a weight's rows, made one after another."""
    step = max(1, _SLICE_ELEMENTS // max(1, columns))
    slices = [slice(start, start + step) for start in range(0, rows, step)]
    if len(slices) == 1:
        return product(slices[0])
    if torch.is_grad_enabled() and x.requires_grad:
        return torch.cat([product(piece) for piece in slices], dim=-1)
    # Written to their place: products put aside would cut up the memory that each slice leaves behind for the next.
    result = x.new_empty((*x.shape[:-1], rows))
    for piece in slices:
        result[..., piece] = product(piece)
    return result


def quantize_activations(x: torch.Tensor, activation: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """8-bit codes of activations with ``x ≈ (code - zero point) · scale``; the range is the data's, and includes 0.

    Args:
        x: ``[..., in]``.
        activation: ``per_token`` (one range for each row) or ``per_tensor`` (one for all, as ONNX
            ``DynamicQuantizeLinear``).

    Returns:
        codes in 0..255 and zero points, as integers in x's dtype, and scales.
    """
    if activation == "per_tensor" and x.numel() == 0:
        low = high = x.new_zeros(())
    elif activation == "per_tensor":
        low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
    else:
        low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    scale = (high - low) / 255
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero = torch.round(-low / scale).clamp(0, 255)
    codes = (torch.round(x / scale) + zero).clamp(0, 255)
    return codes, scale, zero


def linear_int8_dynamic(
    x: torch.Tensor, qweight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, activation: str
) -> torch.Tensor:
    """``y = x̂ Ŵᵀ + b`` with activations quantised on the fly to 8 bits and weights stored as INT8.

    Args:
        x: ``[..., in]``, floating.
        qweight: int8 ``[out, in]``, symmetric per output channel.
        scales: ``[out]``.
        bias: ``[out]`` or ``None``.
        activation: see :func:`quantize_activations`.

    Returns:
        ``[..., out]`` of x's dtype. The sum of products is exact, as with 32-bit integer accumulators. The gradient
        for x is that of ``x Ŵᵀ``: rounding counts as the identity (straight-through, Bengio et al. 2013). A row that
        holds NaN or infinity gives NaN, and with ``per_tensor`` every row does.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    values = x.to(wide)
    with torch.no_grad():
        codes, scale, zero = quantize_activations(values, activation)
    steps = values / scale
    # In value this is the integer `codes - zero`: neighbouring floats subtract without rounding.
    steps = steps + (codes - zero - steps).detach()
    # Integers below 2**53 are exact in float64, and float64 has a fast matrix product where int32 has none.
    exact = steps.double()
    sums = by_rows(exact, lambda piece: functional.linear(exact, qweight[piece].double()), *qweight.shape)
    result = (sums * scale.double()).to(wide) * scales.to(wide)
    return (result + bias.to(wide) if bias is not None else result).to(x.dtype)


def linear_int8_static(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    input_scales: torch.Tensor,
    input_zero_point: int,
) -> torch.Tensor:
    """``y = x̂ Ŵᵀ + b`` with activations quantised to 8 bits on a grid known beforehand and weights stored as INT8.

    A feature may have a scale of its own, which the stored weights have been multiplied with (Xiao et al. 2023,
    "SmoothQuant"): ``x_k ≈ (code_k - zero point) · input_scales_k`` and ``W_nk · input_scales_k ≈ qweight_nk ·
    scales_n``, so ``y_n = scales_n Σ (code_k - zero point) qweight_nk``, an integer sum.

    Args:
        x: ``[..., in]``, floating.
        qweight: int8 ``[out, in]``, symmetric per output channel.
        scales: ``[out]``.
        bias: ``[out]`` or ``None``.
        input_scales: ``[in]``, positive.
        input_zero_point: code that stands for 0, in 0..255.

    Returns:
        ``[..., out]`` of x's dtype. Values beyond the grid are clipped to its ends; NaN stays NaN. The sum of products
        is exact. The gradient for x is that of ``x Ŵᵀ`` inside the grid (straight-through, Bengio et al. 2013) and 0
        beyond it.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    steps = (x.to(wide) / input_scales.to(wide)).clamp(-input_zero_point, 255 - input_zero_point)
    steps = steps + (torch.round(steps) - steps).detach()
    exact = steps.double()
    sums = by_rows(exact, lambda piece: functional.linear(exact, qweight[piece].double()), *qweight.shape)
    result = sums.to(wide) * scales.to(wide)
    return (result + bias.to(wide) if bias is not None else result).to(x.dtype)


def embedding_nbits(
    indices: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor | None,
    bits: int,
    group_size: int,
    embedding_dim: int,
) -> torch.Tensor:
    """Rows of a table stored as integers: ``(code - zero point) · scale`` of the rows looked up.

    Args:
        indices: integer, any shape.
        qweight: packed codes, uint8 ``[vocabulary, G, group_size * bits / 8]``.
        scales: ``[vocabulary, G]``, floating.
        zero_points: uint8 ``[vocabulary, G]``, or ``None`` for ``2**(bits - 1)``.
        bits: 2, 3, 4 or 8.
        group_size: columns to a group.
        embedding_dim: columns.

    Returns:
        ``[*indices, embedding_dim]`` of the scales' dtype, float32 at least.
    """
    flat = indices.reshape(-1)
    zero = zero_points[flat] if zero_points is not None else None
    wide = torch.promote_types(scales.dtype, torch.float32)
    rows = dequantize(qweight[flat], scales[flat], zero, bits, embedding_dim, wide)
    return rows.reshape(*indices.shape, embedding_dim)


def _linear_fake(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
    group_size: int,
) -> torch.Tensor:
    _check_packed(qweight, scales, zero_points, bits, group_size, x.shape[-1], floats=True)
    check_vectors(qweight.shape[0], bias=bias)
    return x.new_empty((*x.shape[:-1], qweight.shape[0]))


def _dynamic_fake(
    x: torch.Tensor, qweight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, activation: str
) -> torch.Tensor:
    if activation not in ACTIVATION_MODES:
        raise ValueError(f"activation {activation!r} is not one of {', '.join(ACTIVATION_MODES)}")
    torch._check(qweight.dtype == torch.int8, lambda: f"qweight must be int8, not {qweight.dtype}")
    torch._check(qweight.shape[1] == x.shape[-1], lambda: f"x has {x.shape[-1]} features, qweight {qweight.shape[1]}")
    check_vectors(qweight.shape[0], scales=scales, bias=bias)
    return x.new_empty((*x.shape[:-1], qweight.shape[0]))


def _static_fake(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    input_scales: torch.Tensor,
    input_zero_point: int,
) -> torch.Tensor:
    if not 0 <= input_zero_point <= 255:
        raise ValueError(f"the input's zero point must be in 0..255, not {input_zero_point}")
    result = _dynamic_fake(x, qweight, scales, bias, "per_tensor")
    check_vectors(qweight.shape[1], input_scales=input_scales)
    return result


def _embedding_fake(
    indices: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor | None,
    bits: int,
    group_size: int,
    embedding_dim: int,
) -> torch.Tensor:
    _check_packed(qweight, scales, zero_points, bits, group_size, embedding_dim)
    wide = torch.promote_types(scales.dtype, torch.float32)
    return scales.new_empty((*indices.shape, embedding_dim), dtype=wide)


def _check_packed(
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor | None,
    bits: int,
    group_size: int,
    columns: Any,
    *,
    floats: bool = False,
) -> None:
    if bits not in BITS:
        raise ValueError(f"bits must be one of {BITS}, not {bits}")
    check_packed(qweight, scales, bits, group_size, columns)
    if zero_points is not None:
        fits = zero_points.dtype == torch.uint8 or (floats and zero_points.is_floating_point())
        kinds = "uint8 or floating" if floats else "uint8"
        torch._check(fits, lambda: f"zero points must be {kinds}, not {zero_points.dtype}")
        torch._check(zero_points.shape == scales.shape, lambda: "zero points must have the shape of the scales")


def check_packed(qweight: torch.Tensor, scales: torch.Tensor, bits: int, group_size: int, columns: Any) -> None:
    """Check codes and scales against the packed layout.

    Raises:
        ValueError, RuntimeError: they do not fit; as PyTorch's own shape rules raise.
    """
    if group_size < 1 or group_size * bits % 8:
        raise ValueError(f"a group of {group_size} codes of {bits} bits does not fill whole bytes")
    groups = -(-int(columns) // group_size)
    expected = (qweight.shape[0], groups, group_size * bits // 8)
    torch._check(qweight.dtype == torch.uint8, lambda: f"qweight must be uint8, not {qweight.dtype}")
    torch._check(tuple(qweight.shape) == expected, lambda: f"qweight must be {expected}, not {tuple(qweight.shape)}")
    torch._check(
        tuple(scales.shape) == expected[:2], lambda: f"scales must be {expected[:2]}, not {tuple(scales.shape)}"
    )


def check_vectors(rows: int, **vectors: torch.Tensor | None) -> None:
    """Check that each vector that is given has as many values as there are rows.

    Raises:
        ValueError: naming the one that has not.
    """
    for name, vector in vectors.items():
        if vector is not None and tuple(vector.shape) != (rows,):
            raise ValueError(f"{name} must be [{rows}], not {list(vector.shape)}")


def linear_macs(arguments: Mapping[str, Any]) -> int:
    """Multiply-accumulates of ``x`` times a weight with a row for each of ``qweight``."""
    count = int(arguments["qweight"][0])
    for size in arguments["x"]:
        count *= int(size)
    return count


def _no_macs(arguments: Mapping[str, Any]) -> int:
    return 0


LINEAR_NBITS = OpDefinition(
    name="linear_nbits",
    schema=(
        "(Tensor x, Tensor qweight, Tensor scales, Tensor? zero_points, Tensor? bias, int bits, int group_size)"
        " -> Tensor"
    ),
    reference=linear_nbits,
    fake=_linear_fake,
    macs=linear_macs,
    differentiable=("x", "bias"),
)

LINEAR_INT8_DYNAMIC = OpDefinition(
    name="linear_int8_dynamic",
    schema="(Tensor x, Tensor qweight, Tensor scales, Tensor? bias, str activation) -> Tensor",
    reference=linear_int8_dynamic,
    fake=_dynamic_fake,
    macs=linear_macs,
    differentiable=("x", "bias"),
)

LINEAR_INT8_STATIC = OpDefinition(
    name="linear_int8_static",
    schema=(
        "(Tensor x, Tensor qweight, Tensor scales, Tensor? bias, Tensor input_scales, int input_zero_point) -> Tensor"
    ),
    reference=linear_int8_static,
    fake=_static_fake,
    macs=linear_macs,
    differentiable=("x", "bias"),
)

EMBEDDING_NBITS = OpDefinition(
    name="embedding_nbits",
    schema=(
        "(Tensor indices, Tensor qweight, Tensor scales, Tensor? zero_points, int bits, int group_size,"
        " int embedding_dim) -> Tensor"
    ),
    reference=embedding_nbits,
    fake=_embedding_fake,
    macs=_no_macs,
)
