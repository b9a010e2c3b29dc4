"""Quantised weights in the layouts ONNX and onnxruntime want.

The dialect keeps ``[N, G, group bytes]`` with codes packed from the lowest bits on, which is the layout of
``MatMulNBits`` when the group size is one of its block sizes. Other group sizes are split into legal blocks and the
scales repeated, which changes no weight.
"""

from __future__ import annotations

import torch

from graphwright.ir.ops import quantization

# The block sizes MatMulNBits has kernels for; DequantizeLinear is fused for the same ones.
BLOCK_SIZES = (256, 128, 64, 32, 16)


def block_size(group_size: int, columns: int) -> int | None:
    """The block size in which groups of this size can be written exactly; ``None`` if there is none.

    Args:
        group_size: as in the program.
        columns: K, the input features.
    """
    if group_size >= columns:
        # One group per row: any block will do. The least padding first, then the fewest scales.
        return min(BLOCK_SIZES, key=lambda size: (-(-columns // size) * size, -size))
    return next((size for size in BLOCK_SIZES if group_size % size == 0), None)


def unpack(qweight: torch.Tensor, bits: int) -> torch.Tensor:
    """Packed ``[N, G, bytes]`` as one uint8 per value, ``[N, G * group]``."""
    if bits == 8:
        return qweight.flatten(1)
    return quantization.unpack(qweight, bits).flatten(1)


def pack(values: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 values packed along the last dimension, low nibble first; its size must be even for 4 bits."""
    if bits == 8:
        return values
    return values[..., 0::2] | (values[..., 1::2] << 4)


def blocked(qweight: torch.Tensor, bits: int, group_size: int, columns: int, block: int) -> torch.Tensor:
    """Weights as ``[N, ceil(K / block), block bytes]``, padded with the middle value."""
    rows, count = qweight.shape[0], -(-columns // block)
    if block == group_size and qweight.shape[1] == count:
        return qweight
    width = count * block * bits // 8
    flat = qweight.flatten(1)
    if flat.shape[1] < width:
        middle = 1 << (bits - 1)
        filler = sum(middle << shift for shift in range(0, 8, bits))
        flat = torch.cat((flat, flat.new_full((rows, width - flat.shape[1]), filler)), dim=1)
    return flat[:, :width].reshape(rows, count, block * bits // 8)


def per_block(values: torch.Tensor, group_size: int, columns: int, block: int) -> torch.Tensor:
    """Scales or zero points ``[N, G]`` repeated for every block: ``[N, ceil(K / block)]``."""
    count = -(-columns // block)
    if block == group_size and values.shape[1] == count:
        return values
    starts = torch.arange(count, device=values.device) * block
    return values[:, (starts // group_size).clamp(max=values.shape[1] - 1)]


def packed_zero_points(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Zero points ``[N, blocks]`` as MatMulNBits reads them: packed by row like codes; the last byte is filled up."""
    per_byte = 8 // bits
    size = -(-values.shape[1] // per_byte) * per_byte
    return quantization.pack(values, bits, size, values.new_zeros(values.shape[0], 1)).squeeze(1)


def pack_flat(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Values packed over the flattened array, as ONNX stores 4-bit tensors; an odd count gets one nibble more."""
    if bits == 8:
        return values
    flat = values.flatten()
    if flat.numel() % 2:
        flat = torch.cat((flat, flat.new_zeros(1)))
    return pack(flat, 4)
