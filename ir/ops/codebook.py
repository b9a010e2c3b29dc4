"""Linears whose weights are codes into a fixed table of values: NF4, FP4 and FP8.

The packed layout is that of :mod:`graphwright.ir.ops.quantization`: 4-bit codes two to a byte, the even column in the
low nibble; 8-bit codes a byte each. A weight is ``table[code] · scale``; there are no zero points. The last group is
padded with the code that stands for 0.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch.nn import functional

from graphwright.ir.ops.definition import OpDefinition
from graphwright.ir.ops.quantization import by_rows, check_packed, check_vectors, linear_macs, unpack


@dataclass(frozen=True)
class Codebook:
    """A table of values that codes stand for.

    Attributes:
        name: as operators and options spell it.
        bits: of a code.
        values: of every code, in order; infinite or NaN where the format has no number, which no weight is stored as.
        zero: the code that stands for 0.
        stored_as: the dtype whose bit patterns the codes are, or ``None``.
    """

    name: str
    bits: int
    values: tuple[float, ...]
    zero: int
    stored_as: torch.dtype | None = None

    @functools.cached_property
    def table(self) -> torch.Tensor:
        """The values, float32 ``[2**bits]``; not to be written to."""
        return torch.tensor(self.values, dtype=torch.float32)

    @functools.cached_property
    def largest(self) -> float:
        """The largest magnitude of a value."""
        return max(abs(value) for value in self.values if math.isfinite(value))


def _patterns(dtype: torch.dtype) -> tuple[float, ...]:
    return tuple(torch.arange(256, dtype=torch.uint8).view(dtype).to(torch.float32).tolist())


# Quantiles of the normal distribution, with an exact 0 (Dettmers et al. 2023, "QLoRA", appendix E).
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
# Sign, two bits of exponent, one of mantissa (Open Compute Project, "OCP Microscaling Formats (MX) 1.0", 5.3.3).
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

NAMES = ("nf4", "fp4", "fp8_e4m3", "fp8_e5m2")


@functools.cache
def codebook(name: str) -> Codebook:
    """The codebook of a name: ``nf4``; ``fp4`` (E2M1); ``fp8_e4m3`` (the variant without infinities); ``fp8_e5m2``.

    Raises:
        ValueError: there is none of that name.
    """
    if name == "nf4":
        return Codebook(name, 4, _NF4, 7)
    if name == "fp4":
        return Codebook(name, 4, _E2M1 + tuple(-value for value in _E2M1), 0)
    if name == "fp8_e4m3":
        return Codebook(name, 8, _patterns(torch.float8_e4m3fn), 0, torch.float8_e4m3fn)
    if name == "fp8_e5m2":
        return Codebook(name, 8, _patterns(torch.float8_e5m2), 0, torch.float8_e5m2)
    raise ValueError(f"codebook {name!r} is not one of {', '.join(NAMES)}")


def dequantize_codebook(
    qweight: torch.Tensor, scales: torch.Tensor, format: str, columns: int, dtype: torch.dtype
) -> torch.Tensor:
    """The weight that packed codes stand for, ``[rows, columns]`` of ``dtype``: ``table[code] · scale``."""
    book = codebook(format)
    if book.stored_as is not None:
        values = qweight.view(book.stored_as).to(dtype)
    else:
        codes = unpack(qweight, book.bits)
        table = book.table.to(codes.device, dtype)
        values = table.index_select(0, codes.flatten().to(torch.int32)).view(codes.shape)
    values *= scales.to(dtype).unsqueeze(-1)
    return values.flatten(1)[:, :columns]


def linear_codebook(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    format: str,
    group_size: int,
) -> torch.Tensor:
    """``y = x Ŵᵀ + b`` with ``Ŵ = table[code] · scale``: stored as codes, computed in floating point.

    Args:
        x: ``[..., in]``, floating.
        qweight: packed codes, uint8 ``[out, G, group_size * bits / 8]``.
        scales: ``[out, G]``, floating.
        bias: ``[out]`` or ``None``.
        format: see :func:`codebook`.
        group_size: columns to a group.

    Returns:
        ``[..., out]`` of x's dtype, computed in float32 or wider.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    values, columns = x.to(wide), x.shape[-1]

    def product(piece: slice) -> torch.Tensor:
        return functional.linear(values, dequantize_codebook(qweight[piece], scales[piece], format, columns, wide))

    result = by_rows(values, product, len(qweight), qweight.shape[1] * group_size)
    return (result + bias.to(wide) if bias is not None else result).to(x.dtype)


def _fake(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    format: str,
    group_size: int,
) -> torch.Tensor:
    check_packed(qweight, scales, codebook(format).bits, group_size, x.shape[-1])
    check_vectors(qweight.shape[0], bias=bias)
    return x.new_empty((*x.shape[:-1], qweight.shape[0]))


LINEAR_CODEBOOK = OpDefinition(
    name="linear_codebook",
    schema="(Tensor x, Tensor qweight, Tensor scales, Tensor? bias, str format, int group_size) -> Tensor",
    reference=linear_codebook,
    fake=_fake,
    macs=linear_macs,
    differentiable=("x", "bias"),
)
