"""Kernels in place of a program's nodes: the table of what lowers which operator."""

from __future__ import annotations

from graphwright.backends.triton.nodes import attention, linears, rounded_linears, rows, sparse_linears
from graphwright.backends.triton.nodes.base import LinearKernel, Lowering, NodeKernel, Site

__all__ = ["LOWERINGS", "LinearKernel", "Lowering", "NodeKernel", "Site"]

# operator -> what makes its kernel, or says why it has none
LOWERINGS: dict[str, Lowering] = {
    "aten.layer_norm": rows.lower_layer_norm,
    "aten.softmax.int": rows.lower_softmax,
    "graphwright.attention": attention.lower_attention,
    "graphwright.cache_append": attention.lower_append,
    "graphwright.cached_attention": attention.lower_cached_attention,
    "graphwright.gated_activation": rows.lower_gated,
    "graphwright.kron_linear": linears.lower_kron,
    "graphwright.linear_codebook": linears.lower_codebook,
    "graphwright.linear_fp8_dynamic": rounded_linears.lower_fp8_dynamic,
    "graphwright.linear_int8_dynamic": rounded_linears.lower_int8_dynamic,
    "graphwright.linear_int8_static": rounded_linears.lower_int8_static,
    "graphwright.linear_nbits": linears.lower_nbits,
    "graphwright.linear_nbits_dynamic": rounded_linears.lower_nbits_dynamic,
    "graphwright.linear_sparse": sparse_linears.lower_sparse,
    "graphwright.rms_norm": rows.lower_rms_norm,
    "graphwright.rotary_embedding": rows.lower_rotary,
}
