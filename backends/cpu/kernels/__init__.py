"""Kernels as modules that stand in a lowered graph: one file per family, each with the table of operators it lowers."""

from typing import Any

from graphwright.backends.cpu.kernels import (
    attention,
    byte_linear,
    decoder_attention,
    embedding,
    float_linear,
    heads,
    kron_linear,
    norms,
    pointwise,
    rotary,
    sparse_linear,
)
from graphwright.backends.cpu.kernels.base import Kernel, Lowering, Site
from graphwright.backends.cpu.kernels.byte_packing import PackedLinear
from graphwright.backends.cpu.kernels.float_linear import PackedFloats
from graphwright.backends.cpu.kernels.sparse_packing import PackedSparse

__all__ = ["KERNELS", "LOWERINGS", "PACKED", "Kernel", "Lowering", "Site"]

_FAMILIES = (attention, byte_linear, embedding, float_linear, kron_linear, norms, pointwise, rotary, sparse_linear)

LOWERINGS: dict[str, Lowering] = {op: lower for family in _FAMILIES for op, lower in family.LOWERINGS.items()}

# By name, for packed files: kernels, and the dataclasses of packed operands that they take.
KERNELS: dict[str, type[Kernel]] = {
    kernel.__name__: kernel
    for kernel in (
        attention.Attention,
        attention.Softmax,
        attention.TorchAttention,
        byte_linear.ByteLinear,
        decoder_attention.DecoderAttention,
        embedding.Embedding,
        embedding.PackedEmbedding,
        float_linear.CodebookLinear,
        float_linear.FloatLinear,
        float_linear.NbitsLinear,
        heads.HeadsAttention,
        kron_linear.KronLinear,
        norms.LayerNorm,
        norms.RmsNorm,
        pointwise.Activation,
        pointwise.Combination,
        pointwise.Difference,
        pointwise.GatedActivation,
        pointwise.LeakyRelu,
        rotary.Rotary,
        sparse_linear.SparseLinear,
    )
}
PACKED: dict[str, type[Any]] = {packed.__name__: packed for packed in (PackedFloats, PackedLinear, PackedSparse)}
