"""Linears on sparse weights."""

from __future__ import annotations

import torch
from torch import fx

from graphwright.backends.onnx import encodings
from graphwright.backends.onnx.lowering import Lowering
from graphwright.backends.onnx.translations.integer import Int8Weight, multiply_dynamic, multiply_static
from graphwright.backends.onnx.translations.weight_only import StoredWeights, multiply
from graphwright.ir.ops.quantization import pack
from graphwright.ir.ops.sparse import bits_of, decompress, dense_codes
from graphwright.ir.ops.sparse_int8 import int8_weight


def linear_outliers(
    lower: Lowering, node: fx.Node, x: fx.Node, row_pointers: fx.Node, columns: fx.Node, values: fx.Node
) -> None:
    """``ScatterElements -> MatMul``: the file holds the few values, the runtime makes a matrix of them as it opens it.

    ONNX has no operator for products with sparse matrices.

    Raises:
        ExportError: the matrix is computed, not stored, or the input features vary.
    """
    features = lower.shape(x)[-1]
    if not isinstance(features, int):
        raise lower.refuse(node, "the input features vary from call to call")
    for each in (row_pointers, columns, values):
        if each.op != "get_attr":
            raise lower.refuse(node, "a sparse weight must be stored, here it is computed")
    pointers, places = (lower.program.tensor(each).detach().to(torch.int64) for each in (row_pointers, columns))
    outputs, graph, dtype = len(pointers) - 1, lower.graph, lower.dtype(node)

    def flat() -> torch.Tensor:
        rows = torch.repeat_interleave(torch.arange(outputs), pointers.diff())
        return places * outputs + rows

    index = graph.derived(f"{columns.target}.flat", torch.int64, tuple(places.shape), flat)
    zeros = graph.call("Expand", graph.constant(0.0, dtype), graph.integers(features * outputs))
    filled = graph.call("ScatterElements", zeros, index, lower.tensor(values, dtype), axis=0)
    weight = graph.call("Reshape", filled, graph.integers(features, outputs))
    lower.set_rows(node, graph.call("MatMul", lower.rows(x), weight))


def linear_sparse(
    lower: Lowering,
    node: fx.Node,
    x: fx.Node,
    mask: fx.Node,
    values: fx.Node,
    row_offsets: fx.Node,
    scales: fx.Node | None,
    zero_points: fx.Node | None,
    bias: fx.Node | None,
    format: str,
    group_size: int,
) -> None:
    """The dense linear, ``Gemm`` or what ``linear_nbits`` is written as: onnxruntime has no kernel that skips zeros.

    Weights get back the names that they had before they were compressed.

    Raises:
        ExportError: the weight is computed, the input features vary, or its groups have no kernel.
    """
    columns = lower.shape(x)[-1]
    if not isinstance(columns, int):
        raise lower.refuse(node, "the input features vary from call to call")
    operands = (mask, values, row_offsets, scales, zero_points)
    if any(each is not None and each.op != "get_attr" for each in operands):
        raise lower.refuse(node, "a sparse weight must be stored, here it is computed")
    tensors = [lower.program.tensor(each).detach() if each is not None else None for each in operands]
    bits, stored, offsets, factors, zeros = tensors
    assert bits is not None
    assert stored is not None
    assert offsets is not None
    name = str(mask.target).removesuffix("_mask")
    if format == "float":
        dtype = lower.dtype(node)

        def dense() -> torch.Tensor:
            return decompress(bits, stored, offsets, None, None, format, group_size, columns, dtype)

        weight = lower.graph.derived(name, dtype, (len(bits), columns), dense)
        parts = [lower.rows(x), weight]
        if bias is not None:
            parts.append(lower.tensor(bias))
        lower.set_rows(node, lower.graph.call("Gemm", *parts, transB=1))
        return
    block = encodings.block_size(group_size, columns)
    if block is None or group_size * bits_of(format) % 8:
        raise lower.refuse(
            node,
            f"onnxruntime has no kernel for groups of {group_size}: it would run this linear in float",
            "quantise with a group size that is a multiple of 16, or per channel",
        )
    codes = dense_codes(bits, stored, offsets, zeros, format, group_size, columns)
    packed = pack(codes, bits_of(format), group_size, zeros)
    names = [name, *(str(each.target) if each is not None else "" for each in (scales, zero_points))]
    weights = StoredWeights.of(names, [packed, factors, zeros], bits_of(format), group_size, columns, block)
    multiply(lower, node, x, weights, bias)


def linear_sparse_dynamic(
    lower: Lowering,
    node: fx.Node,
    x: fx.Node,
    mask: fx.Node,
    values: fx.Node,
    row_offsets: fx.Node,
    scales: fx.Node,
    bias: fx.Node | None,
    activation: str,
) -> None:
    """What ``linear_int8_dynamic`` is written as, on the dense weight under its old name.

    Raises:
        ExportError: the weight is computed, the input features vary, or the activations are not float32.
    """
    weight = _int8(lower, node, x, mask, values, row_offsets)
    multiply_dynamic(lower, node, x, weight, scales, bias, activation)


def linear_sparse_static(
    lower: Lowering,
    node: fx.Node,
    x: fx.Node,
    mask: fx.Node,
    values: fx.Node,
    row_offsets: fx.Node,
    scales: fx.Node,
    bias: fx.Node | None,
    input_scales: fx.Node,
    input_zero_point: int,
) -> None:
    """What ``linear_int8_static`` is written as, on the dense weight under its old name.

    Raises:
        ExportError: the weight is computed, the input features vary, or the activations are not float32.
    """
    weight = _int8(lower, node, x, mask, values, row_offsets)
    multiply_static(lower, node, x, weight, scales, bias, input_scales, input_zero_point)


def _int8(
    lower: Lowering, node: fx.Node, x: fx.Node, mask: fx.Node, values: fx.Node, row_offsets: fx.Node
) -> Int8Weight:
    columns = lower.shape(x)[-1]
    if not isinstance(columns, int):
        raise lower.refuse(node, "the input features vary from call to call")
    if any(each.op != "get_attr" for each in (mask, values, row_offsets)):
        raise lower.refuse(node, "a sparse weight must be stored, here it is computed")
    bits, stored = (lower.program.tensor(each).detach() for each in (mask, values))
    name = str(mask.target).removesuffix("_mask")
    return Int8Weight(name, len(bits), columns, lambda: int8_weight(bits, stored, columns))
