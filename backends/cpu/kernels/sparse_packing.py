"""Weights that are mostly zeros in the layout that the kernels stream (``csrc/sparse_linear_kernels.h``)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from graphwright.backends.cpu.kernels.byte_packing import PANEL, cells
from graphwright.backends.cpu.kernels.sparse_cost import stored_blocks


@dataclass(frozen=True)
class PackedSparse:
    """Packed operands of one sparse linear.

    Attributes:
        outputs, columns: of the matrix.
        kind: of its values: ``float32``, ``bfloat16``, ``int8`` or ``int4``.
        group: columns of a group as they are stored; 0 for floats.
        masks: int64, flat, ``[panels, steps, words of a step]``; the bits say which weights are stored.
        values: uint8, flat: the values of a word of bits after those of the one before it, and some bytes beyond.
        offsets: int64, flat: where the values of every block of steps begin, and where the last ends, in bytes.
        scales: float16 or float32, flat, ``[panels, groups, 64]``; ``None`` for floats.
        zeros: uint8 like the scales, or ``None`` for the middle code everywhere.
        count: values that are stored.
    """

    outputs: int
    columns: int
    kind: str
    group: int
    masks: torch.Tensor
    values: torch.Tensor
    offsets: torch.Tensor
    scales: torch.Tensor | None
    zeros: torch.Tensor | None
    count: int

    @property
    def nbytes(self) -> int:
        """Bytes that a product with one row reads."""
        held = (self.masks, self.values, self.scales, self.zeros)
        return sum(each.numel() * each.element_size() for each in held if each is not None)

    @property
    def density(self) -> float:
        """The share of weights that are stored."""
        return self.count / (self.outputs * self.columns)

    @property
    def coded(self) -> bool:
        """Whether its values are codes."""
        return self.group > 0

    @property
    def blocks(self) -> float:
        """The share of blocks of four columns, of codes, in which a weight is stored."""
        return stored_blocks(self.masks.view(torch.uint8)) / (self.outputs * -(-self.columns // 4))

    @property
    def described(self) -> str:
        """Its weights in words."""
        return f"{self.kind} weights of which {1 - self.density:.1%} are zeros"


def pack_sparse(
    mask: torch.Tensor,
    values: torch.Tensor,
    row_offsets: torch.Tensor,
    scales: torch.Tensor | None,
    zero_points: torch.Tensor | None,
    format: str,
    group_size: int,
    columns: int,
) -> PackedSparse:
    """Pack the operands of ``linear_sparse``, see :mod:`graphwright.ir.ops.sparse`; float16 values become float32.

    Raises:
        ValueError: the mask has other bits than ``row_offsets`` and ``values`` say.
    """
    from graphwright.backends.cpu import _native  # not at the top: it may be absent

    outputs, threads, values = len(mask), torch.get_num_threads(), values.detach().contiguous()
    kind = format
    if format == "float":
        kind = "bfloat16" if values.dtype == torch.bfloat16 else "float32"
        values = values if kind == "bfloat16" else values.to(torch.float32)
    coded = format != "float"
    steps = -(-columns // group_size) * -(-group_size // 4) if coded else columns
    panels, blocks = -(-outputs // PANEL), -(-steps // _native.SPARSE_STEPS)
    masks = torch.empty(panels * steps * (4 if coded else 1), dtype=torch.int64)
    offsets = torch.empty(panels * blocks + 1, dtype=torch.int64)
    stored, given = mask.contiguous().numpy(), values.view(torch.uint8).numpy()
    shape = stored, columns, kind, group_size
    words, places = masks.numpy().view(np.uint64), offsets.numpy().view(np.uint64)
    _native.pack_sparse_masks(*shape, words, places, threads)
    packed = torch.zeros(int(offsets[-1]) + _native.SPARSE_BEYOND, dtype=torch.uint8)
    _native.pack_sparse_values(*shape, given, row_offsets.numpy(), words, places, packed.numpy(), threads)
    own = None
    if scales is not None:
        own = cells((scales if scales.dtype in (torch.float16, torch.float32) else scales.to(torch.float32)).detach())
    zeros = cells(zero_points) if zero_points is not None else None
    count = int(row_offsets[-1])
    return PackedSparse(outputs, columns, kind, group_size, masks, packed, offsets, own, zeros, count)
