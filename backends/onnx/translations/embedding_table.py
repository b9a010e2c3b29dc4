"""Embeddings on quantised tables."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from graphwright.backends.onnx import encodings
from graphwright.backends.onnx.graph import CONTRIB
from graphwright.backends.onnx.lowering import Lowering
from graphwright.backends.onnx.translations.weight_only import StoredWeights
from graphwright.ir.ops.quantization import widened


def embedding_nbits(
    lower: Lowering,
    node: fx.Node,
    indices: fx.Node,
    qweight: fx.Node,
    scales: fx.Node,
    zero_points: fx.Node | None,
    bits: int,
    group_size: int,
    embedding_dim: int,
) -> None:
    """``GatherBlockQuantized`` for the runtime; in portable files the rows read are gathered, unpacked and scaled."""
    block = encodings.block_size(group_size, embedding_dim)
    if lower.options.has_contrib and block is not None and embedding_dim % block == 0:
        _gather_block_quantized(lower, node, indices, (qweight, scales, zero_points), bits, group_size, block)
        return
    _gather_rows(lower, node, indices, (qweight, scales, zero_points), bits, group_size)


def _gather_block_quantized(
    lower: Lowering,
    node: fx.Node,
    indices: fx.Node,
    stored: tuple[fx.Node, fx.Node, fx.Node | None],
    bits: int,
    group_size: int,
    block: int,
) -> None:
    width = lower.shape(node)[-1]
    assert isinstance(width, int)
    weights = StoredWeights(lower, stored, bits, group_size, width, block)
    graph, last = lower.graph, lower.graph.integers(-1)
    # Blocks of a row apart from each other, as MatMulNBits takes them: a tied head reads the same bytes.
    packed, scales = weights.values(lower, lower.dtype(node))
    zero_points = None
    if weights.zero_points is not None:
        points = weights.zero_points
        zero_points = graph.derived(
            f"{weights.names[2]}.blocked",
            torch.uint8,
            (weights.rows, weights.blocks, 1),
            lambda: weights.per_block(points).unsqueeze(2),
        )
    value = graph.call(
        "GatherBlockQuantized",
        packed,
        lower.tensor(indices),
        lower.once(("opened", scales), lambda: graph.call("Unsqueeze", scales, last)),
        zero_points,
        domain=CONTRIB,
        gather_axis=0,
        quantize_axis=2,
        block_size=block,
        bits=weights.bits,
    )
    lower.set(node, value, (*lower.shape(indices), weights.blocks, block))


def _gather_rows(
    lower: Lowering,
    node: fx.Node,
    indices: fx.Node,
    stored: tuple[fx.Node, fx.Node, fx.Node | None],
    bits: int,
    group_size: int,
) -> None:
    graph, dtype = lower.graph, lower.dtype(node)
    position = lower.tensor(indices)
    groups = lower.shape(stored[1])[1]
    assert isinstance(groups, int)
    shape = (*lower.shape(indices), groups)

    def gathered(each: fx.Node) -> ir.Value:
        return graph.call("Gather", lower.tensor(each), position, axis=0)

    if bits in (2, 3):
        codes = lower.program.tensor(stored[0]).detach()
        shape_of = (codes.shape[0], groups, group_size // 2)
        wide = graph.derived(
            f"{stored[0].target}.widened",
            torch.uint8,
            shape_of,
            lambda: widened(codes, bits, symmetric=stored[2] is None),
        )
        table = graph.call("Gather", wide, position, axis=0)
    else:
        table = gathered(stored[0])
    middle = 128 if bits == 8 else 8
    if bits != 8:
        low = graph.call("BitwiseAnd", table, graph.constant(15, torch.uint8))
        high = graph.call("BitShift", table, graph.constant(4, torch.uint8), direction="RIGHT")
        last = graph.integers(-1)
        pairs = [graph.call("Unsqueeze", each, last) for each in (low, high)]
        table = graph.call("Concat", *pairs, axis=-1)
        table = graph.call("Reshape", table, lower.sizes.vector((*shape, group_size)))
    integers = graph.call("Cast", table, to=_code(dtype))
    last = graph.integers(-1)
    points: Any = graph.constant(middle, dtype)
    if stored[2] is not None:
        points = graph.call("Unsqueeze", graph.call("Cast", gathered(stored[2]), to=_code(dtype)), last)
    scale = graph.call("Unsqueeze", lower.cast(gathered(stored[1]), lower.dtype(stored[1]), dtype), last)
    values = graph.call("Mul", graph.call("Sub", integers, points), scale)
    flat = graph.call("Reshape", values, lower.sizes.vector((*lower.shape(indices), groups * group_size)))
    width = lower.shape(node)[-1]
    if width != groups * group_size:
        flat = graph.call("Slice", flat, graph.integers(0), lower.sizes.vector((width,)), last)
    lower.set(node, flat)


def _code(dtype: torch.dtype) -> int:
    from onnx_ir.tensor_adapters import from_torch_dtype

    return int(from_torch_dtype(dtype).value)
