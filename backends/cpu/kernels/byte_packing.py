"""Weights in the layout that the kernels stream: outputs in panels of 64, columns in steps (``csrc/linear.h``)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from graphwright.ir.ops.quantization import widened

PANEL = 64
STEP_BYTES = 256


@dataclass(frozen=True)
class PackedLinear:
    """Packed operands of one linear.

    Attributes:
        outputs, columns: of the matrix.
        bits: 2, 4 or 8, of a code as the kernels read it.
        group: columns of a group, padded to whole steps.
        codes: uint8, flat, ``[panels, groups, steps of a group, 256]``.
        scales: float16 or float32, flat, ``[panels, groups, 64]``.
        zeros: uint8 like the scales, or ``None`` for the middle code everywhere.
        sums: int32 ``[panels * 64]``, of each row's codes less their zero points; for activations with a shift.
        narrow: bits of a code in the program, where those are fewer.
    """

    outputs: int
    columns: int
    bits: int
    group: int
    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None = None
    sums: torch.Tensor | None = None
    narrow: int | None = None

    @property
    def described(self) -> str:
        """Its weights in words."""
        if self.narrow is None:
            return f"{self.bits}-bit weights"
        return f"{self.narrow}-bit weights stored as {self.bits}-bit codes"

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads."""
        held = (self.codes, self.scales, self.zeros, self.sums)
        return sum(each.numel() * each.element_size() for each in held if each is not None)


def pack_nbits(
    qweight: torch.Tensor, scales: torch.Tensor, zero_points: torch.Tensor | None, bits: int, columns: int
) -> PackedLinear:
    """Pack the operands of ``linear_nbits``.

    Args:
        qweight: uint8 ``[out, G, bytes]``, see :mod:`graphwright.ir.ops.quantization`.
        scales: ``[out, G]``.
        zero_points: uint8 ``[out, G]`` or ``None``.
        bits: 2, 3, 4 or 8. Codes of 3 bits are stored in 4, which changes no value.
        columns: input features.
    """
    narrow = 3 if bits == 3 else None
    if narrow is not None:
        qweight, bits = widened(qweight, bits, symmetric=zero_points is None), 4
    codes, group = _codes(qweight.contiguous(), bits)
    kept = scales if scales.dtype in (torch.float16, torch.float32) else scales.to(torch.float32)
    zeros = cells(zero_points) if zero_points is not None else None
    return PackedLinear(qweight.shape[0], columns, bits, group, codes, cells(kept.detach()), zeros, narrow=narrow)


def pack_int8(qweight: torch.Tensor, scales: torch.Tensor) -> PackedLinear:
    """Pack int8 weights ``[out, in]`` with one scale per row, as ``linear_int8_dynamic`` and ``_static`` have them."""
    outputs, columns = qweight.shape
    unsigned = torch.zeros(outputs, 1, -(-columns // 4) * 4, dtype=torch.uint8)
    # The sign bit turned over is the code with zero point 128.
    unsigned[:, 0, :columns] = qweight.detach().view(torch.uint8) ^ 128
    codes, group = _codes(unsigned, 8)
    sums = torch.zeros(-(-outputs // PANEL) * PANEL, dtype=torch.int32)
    sums[:outputs] = qweight.sum(dim=1, dtype=torch.int32)
    kept = cells(scales.detach().to(torch.float32).unsqueeze(1))
    return PackedLinear(outputs, columns, 8, group, codes, kept, None, sums)


def _codes(stored: torch.Tensor, bits: int) -> tuple[torch.Tensor, int]:
    from graphwright.backends.cpu import _native  # not at the top: it may be absent

    outputs, groups, group_bytes = stored.shape
    steps = -(-group_bytes // 4)
    codes = torch.empty(-(-outputs // PANEL) * groups * steps * STEP_BYTES, dtype=torch.uint8)
    _native.pack_codes(stored.numpy(), bits, codes.numpy(), torch.get_num_threads())
    return codes, steps * 32 // bits


def cells(values: torch.Tensor) -> torch.Tensor:
    """``[out, G]`` as ``[panels, G, 64]``, flat; what is padded is 0."""
    outputs, groups = values.shape
    padded = values.new_zeros(-(-outputs // PANEL) * PANEL, groups)
    padded[:outputs] = values
    return padded.view(-1, PANEL, groups).transpose(1, 2).contiguous().flatten()
