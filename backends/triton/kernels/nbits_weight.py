"""Packed 4- and 8-bit weights as the kernels read them.

The dialect has neighbouring columns in the nibbles of a byte, so a kernel would have to interleave what it unpacks.
Here a byte has columns that are ``half`` apart: low nibbles of ``half`` bytes are ``half`` neighbouring columns, the
high nibbles the next ``half``. Both halves are multiplied with stretches of the input as it lies, and as ``half``
divides the group, each has one scale to an output. 8-bit codes stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from graphwright.ir.ops.quantization import unpack, widened


@dataclass(frozen=True)
class NbitsWeight:
    """A weight ``[out, in]`` of codes.

    Attributes:
        packed: uint8 ``[out, bytes]``.
        scales: ``[out, G]``, floating.
        zero_points: uint8 ``[out, G]`` or ``None`` for the middle.
        bits: 4 or 8.
        group_size: columns to a group.
        half: columns that are unpacked together.
        columns: in.
    """

    packed: torch.Tensor
    scales: torch.Tensor
    zero_points: torch.Tensor | None
    bits: int
    group_size: int
    half: int
    columns: int

    @property
    def outputs(self) -> int:
        """Rows of the weight."""
        return int(self.packed.shape[0])

    @property
    def chunks(self) -> int:
        """Steps along the input: ``half`` bytes each."""
        return int(self.packed.shape[1]) // self.half

    @property
    def nbytes(self) -> int:
        """That a product reads of it."""
        zeros = 0 if self.zero_points is None else self.zero_points.nbytes
        return self.packed.nbytes + self.scales.nbytes + zeros

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight that the codes stand for, ``[out, in]``, in plain torch; the inverse of :func:`repack`."""
        codes = self.packed.unflatten(1, (-1, self.half))
        codes = torch.stack((codes & 15, codes >> 4), 2) if self.bits == 4 else codes
        codes = codes.flatten(1)[:, : self.columns].to(dtype)
        group = torch.arange(self.columns, device=codes.device) // self.group_size
        zeros = 2 ** (self.bits - 1) if self.zero_points is None else self.zero_points.to(dtype)[:, group]
        return (codes - zeros) * self.scales.to(dtype)[:, group]


def refusal(bits: int, group_size: int, zero_points: torch.Tensor | None) -> str | None:
    """Why kernels cannot read a weight, or ``None`` where they can."""
    if bits not in (2, 3, 4, 8):
        return f"there are kernels for 2, 3, 4 and 8 bits, not {bits}"
    if group_size % 32:
        return f"groups of {group_size} columns are no multiple of 32"
    if zero_points is not None and zero_points.is_floating_point():
        return "zero points lie between codes"
    return None


def repack(
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor | None,
    bits: int,
    group_size: int,
    columns: int,
) -> NbitsWeight:
    """A weight in the dialect's layout (:mod:`graphwright.ir.ops.quantization`) as kernels read it.

    Args:
        qweight: uint8 ``[out, G, group_size * bits / 8]``.
        scales: ``[out, G]``, floating.
        zero_points: uint8 ``[out, G]`` or ``None``.
        bits: 2, 3, 4 or 8; fewer than 4 are stored in 4.
        group_size: a multiple of 32.
        columns: in.
    """
    if bits in (2, 3):
        qweight, bits = widened(qweight, bits, symmetric=zero_points is None), 4
    half = 64 if group_size % 64 == 0 else 32
    scales = scales.contiguous()
    zeros = None if zero_points is None else zero_points.contiguous()
    if bits == 8:
        return NbitsWeight(qweight.flatten(1).contiguous(), scales, zeros, 8, group_size, half, columns)
    codes = unpack(qweight, 4).flatten(1)
    # Padding meets inputs that are not there, which count as 0.
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[1] % (2 * half)))
    low, high = codes.unflatten(1, (-1, 2, half)).unbind(2)
    return NbitsWeight((low | high << 4).flatten(1).contiguous(), scales, zeros, 4, group_size, half, columns)
