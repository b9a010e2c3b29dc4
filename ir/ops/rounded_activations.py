"""Linears on packed weights whose activations are rounded to a few bits as they come: integers, and FP8."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from graphwright.ir.ops.codebook import LINEAR_CODEBOOK, codebook, dequantize_codebook
from graphwright.ir.ops.definition import OpDefinition
from graphwright.ir.ops.quantization import LINEAR_NBITS, by_rows, unpack

ACTIVATION_BITS = (4, 8)
ACTIVATION_RANGES = ("per_token", "per_group")

# Weights are unpacked in slices of at most this many elements.
_SLICE_ELEMENTS = 1 << 20
# Smaller ranges count as nothing: the reciprocal of their step overflows.
_TINY = 1e-35
_E4M3 = "fp8_e4m3"


def round_activations(
    x: torch.Tensor, bits: int, activation: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Codes of activations with ``x ≈ code · scale + low``, each row by itself.

    ``per_token``: asymmetric, ``low`` is the row's least value and ``scale = (greatest - low) / (2**bits - 1)``
    (Ashkboos et al. 2023, "QUIK", sec. 3). ``per_group``: symmetric, one scale for each group of each row,
    ``greatest |x| / (2**(bits - 1) - 1)``, and no ``low``.

    Args:
        x: ``[..., G, group]``, floating.
        bits: 4 or 8.
        activation: ``per_token`` or ``per_group``.

    Returns:
        codes ``[..., G, group]`` (integers in x's dtype), scales ``[..., G or 1, 1]`` and lows ``[..., 1, 1]`` or
        ``None``. Rows that hold NaN or infinity give NaN.
    """
    if activation == "per_group":
        top = float(2 ** (bits - 1) - 1)
        size = x.abs().amax(-1, keepdim=True)
        size = torch.where(torch.isfinite(size), size, torch.nan)
        some = ~(size < _TINY)
        scale = torch.where(some, size / top, torch.zeros_like(size))
        codes = torch.round(x * torch.where(some, top / size, torch.zeros_like(size)))
        return codes.clamp(-top - 1, top), scale, None
    low, high = x.amin((-2, -1), keepdim=True), x.amax((-2, -1), keepdim=True)
    scale = (high - low) / float(2**bits - 1)
    scale = torch.where(scale < _TINY, torch.ones_like(scale), scale)
    scale = torch.where(torch.isfinite(scale), scale, torch.nan)
    return torch.round((x - low) / scale).clamp(0, float(2**bits - 1)), scale, low


def linear_nbits_dynamic(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
    group_size: int,
    activation_bits: int,
    activation: str,
) -> torch.Tensor:
    """``y = x̂ Ŵᵀ + b``: weights as in ``linear_nbits``, activations rounded on the fly to 4 or 8 bits.

    Products of codes are summed as integers within each group, exactly; groups are added in floating point.

    Args:
        x: ``[..., in]``, floating.
        qweight: packed codes, uint8 ``[out, G, group_size * bits / 8]``.
        scales: ``[out, G]``, floating.
        zero_points: uint8 ``[out, G]``, or ``None`` for ``2**(bits - 1)`` (symmetric).
        bias: ``[out]`` or ``None``.
        bits: of the weights.
        group_size: columns to a group.
        activation_bits: 4 or 8.
        activation: ``per_token`` (asymmetric, as QUIK) or ``per_group`` (symmetric, one scale for each row and group
            of the weights), see :func:`round_activations`.

    Returns:
        ``[..., out]`` of x's dtype. The gradient for x is that of ``x Ŵᵀ`` (straight-through, Bengio et al. 2013). A
        row that holds NaN or infinity gives NaN.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    columns, groups = x.shape[-1], qweight.shape[1]
    values = x.to(wide)
    padding = groups * group_size - columns
    if padding:  # with the last column: it changes no range, and meets codes that stand for 0
        fill = values[..., -1:] if activation == "per_token" else torch.zeros_like(values[..., -1:])
        values = torch.cat((values, fill.expand(*fill.shape[:-1], padding)), dim=-1)
    values = values.unflatten(-1, (groups, group_size))
    with torch.no_grad():
        codes, scale, low = round_activations(values, activation_bits, activation)
    if torch.is_grad_enabled() and values.requires_grad:
        exact = (values - low if low is not None else values) / torch.where(scale == 0, 1.0, scale)
        codes = exact + (codes - exact).detach()
    rows = len(qweight)
    step = max(1, _SLICE_ELEMENTS // max(1, groups * group_size))
    pieces = []
    for start in range(0, rows, step):
        part = slice(start, start + step)
        middle = 2 ** (bits - 1) if zero_points is None else zero_points[part].unsqueeze(-1).to(torch.int16)
        steps = unpack(qweight[part], bits).to(torch.int16) - middle
        pieces.append(_product(codes, scale, low, steps, scales[part].to(wide), wide))
    result = torch.cat(pieces, dim=-1) if len(pieces) != 1 else pieces[0]
    return (result + bias.to(wide) if bias is not None else result).to(x.dtype)


def _product(
    codes: torch.Tensor,
    scale: torch.Tensor,
    low: torch.Tensor | None,
    steps: torch.Tensor,
    scales: torch.Tensor,
    wide: torch.dtype,
) -> torch.Tensor:
    """``[..., out]`` of one slice of the weights, ``steps [out, G, group]`` and ``scales [out, G]``."""
    result = torch.zeros((*codes.shape[:-2], len(steps)), dtype=wide, device=codes.device)
    for group in range(steps.shape[1]):
        # Integers below 2**53 are exact in float64, which has a fast matrix product where int32 has none.
        sums = functional.linear(codes[..., group, :].double(), steps[:, group].double()).to(wide)
        factor = scale[..., group, :] if low is None else scale[..., 0, :]
        result = result + sums * factor * scales[:, group]
    if low is None:
        return result
    return result + low[..., 0, :] * (steps.sum(-1).to(wide) * scales).sum(-1)


def _fake(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
    group_size: int,
    activation_bits: int,
    activation: str,
) -> torch.Tensor:
    if activation_bits not in ACTIVATION_BITS:
        raise ValueError(f"activation_bits must be one of {ACTIVATION_BITS}, not {activation_bits}")
    if activation not in ACTIVATION_RANGES:
        raise ValueError(f"activation {activation!r} is not one of {', '.join(ACTIVATION_RANGES)}")
    check: Any = LINEAR_NBITS.fake
    result: torch.Tensor = check(x, qweight, scales, zero_points, bias, bits, group_size)
    return result


LINEAR_NBITS_DYNAMIC = OpDefinition(
    name="linear_nbits_dynamic",
    schema=(
        "(Tensor x, Tensor qweight, Tensor scales, Tensor? zero_points, Tensor? bias, int bits, int group_size,"
        " int activation_bits, str activation) -> Tensor"
    ),
    reference=linear_nbits_dynamic,
    fake=_fake,
    macs=LINEAR_NBITS.macs,
    differentiable=("x", "bias"),
)


def round_fp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations as ``x ≈ value · scale``: E4M3 values, and ``scale = greatest |x| / 448`` along the last dimension.

    Args:
        x: ``[..., n]``, float32 or wider.

    Returns:
        values in x's dtype, to the nearest with ties to even, and scales ``[..., 1]``. Rows that hold NaN or infinity
        have a NaN scale.
    """
    size = x.abs().amax(-1, keepdim=True)
    scale = torch.where(size < _TINY, torch.ones_like(size), size / codebook(_E4M3).largest)
    scale = torch.where(torch.isfinite(size), scale, torch.nan)
    return (x / scale).to(torch.float8_e4m3fn).to(x.dtype), scale


def linear_fp8_dynamic(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    group_size: int,
    activation: str,
) -> torch.Tensor:
    """``y = x̂ Ŵᵀ + b``: weights as in ``linear_codebook`` with ``fp8_e4m3``, activations rounded to it on the fly
    (Micikevicius et al. 2022, "FP8 formats for deep learning", sec. 3).

    Args:
        x: ``[..., in]``, floating.
        qweight: E4M3 numbers as bytes, uint8 ``[out, G, group_size]``.
        scales: ``[out, G]``, floating.
        bias: ``[out]`` or ``None``.
        group_size: columns to a group.
        activation: ``per_token`` (one scale for each row) or ``per_group`` (one for each row and group of the weights),
            see :func:`round_fp8`.

    Returns:
        ``[..., out]`` of x's dtype, computed in float32 or wider. The gradient for x is that of ``x Ŵᵀ``
        (straight-through, Bengio et al. 2013). A row that holds NaN or infinity gives NaN.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    values, columns = x.to(wide), x.shape[-1]
    padding = qweight.shape[1] * group_size - columns
    grouped = functional.pad(values, (0, padding)).unflatten(-1, (qweight.shape[1], group_size))
    with torch.no_grad():
        rounded, scale = round_fp8(grouped if activation == "per_group" else values)
        exact = (rounded * scale).flatten(-2)[..., :columns] if activation == "per_group" else rounded * scale
        # What is not finite leaves no number in its row, also where it is in one group of it.
        exact = torch.where(exact.isnan().any(-1, keepdim=True), torch.nan, exact)
    values = values + (exact - values).detach()

    def product(piece: slice) -> torch.Tensor:
        weight = dequantize_codebook(qweight[piece], scales[piece], _E4M3, columns, wide)
        return functional.linear(values, weight)

    result = by_rows(values, product, len(qweight), qweight.shape[1] * group_size)
    return (result + bias.to(wide) if bias is not None else result).to(x.dtype)


def _fp8_fake(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    group_size: int,
    activation: str,
) -> torch.Tensor:
    if activation not in ACTIVATION_RANGES:
        raise ValueError(f"activation {activation!r} is not one of {', '.join(ACTIVATION_RANGES)}")
    check: Any = LINEAR_CODEBOOK.fake
    result: torch.Tensor = check(x, qweight, scales, bias, _E4M3, group_size)
    return result


LINEAR_FP8_DYNAMIC = OpDefinition(
    name="linear_fp8_dynamic",
    schema="(Tensor x, Tensor qweight, Tensor scales, Tensor? bias, int group_size, str activation) -> Tensor",
    reference=linear_fp8_dynamic,
    fake=_fp8_fake,
    macs=LINEAR_NBITS.macs,
    differentiable=("x", "bias"),
)
