"""Linears on int8 weights whose activations are rounded to 8 bits as they come.

The runtime's integer kernels are fast for unsigned activations only (signed ones are ten times slower, onnxruntime
1.31): symmetric activations are stored with a zero point of 128. One rounding serves every linear that reads the same
tensor.
"""

from __future__ import annotations

import onnx_ir as ir
import torch
from torch import fx

from graphwright.backends.onnx.graph import CONTRIB
from graphwright.backends.onnx.lowering import Lowering

# Smallest scale of a row, so that a row of zeros is not divided by zero.
_SMALLEST = torch.finfo(torch.float32).tiny


def linear_int8_dynamic(
    lower: Lowering,
    node: fx.Node,
    x: fx.Node,
    qweight: fx.Node,
    scales: fx.Node,
    bias: fx.Node | None,
    activation: str,
) -> None:
    """``MatMulIntegerToFloat`` for the runtime; ``MatMulInteger`` and its scaling written out in portable files.

    ``per_tensor`` activations are rounded by ``DynamicQuantizeLinear``; ``per_token`` ones by a ``QuantizeLinear``
    that takes one scale per row.
    """
    if qweight.op != "get_attr":
        raise lower.refuse(node, "quantised weights must be stored, here they are computed")
    graph, dtype = lower.graph, lower.dtype(node)
    tensor = lower.program.tensor(qweight).detach()
    name = str(qweight.target)
    weight = graph.derived(f"{name}.transposed", torch.int8, (tensor.shape[1], tensor.shape[0]), tensor.t)
    factors = lower.tensor(scales, dtype)
    shift = lower.tensor(bias, dtype) if bias is not None else None
    if activation == "per_token":
        rounded, step = lower.once(("per token", lower.elements(x)), lambda: _per_token(lower, x))
        one, middle = graph.constant(1.0, dtype), graph.constant(128, torch.uint8)
        values = _product(lower, rounded, weight, one, factors, middle, None)
        values.append(graph.call("Mul", values[-1], step))
        if shift is not None:
            values.append(graph.call("Add", values[-1], shift))
    else:
        rounded, step, middle = lower.once(("per tensor", lower.elements(x)), lambda: _per_tensor(lower, x))
        values = _product(lower, rounded, weight, step, factors, middle, shift)
    lower.set_rows(node, values[-1])
    lower.expect(node, "MatMulIntegerToFloat", values)


def _product(
    lower: Lowering,
    rounded: ir.Value,
    weight: ir.Value,
    step: ir.Value,
    factors: ir.Value,
    middle: ir.Value,
    shift: ir.Value | None,
) -> list[ir.Value]:
    graph = lower.graph
    if lower.options.has_contrib:
        operands = [rounded, weight, step, factors, middle, None, shift]
        return [graph.call("MatMulIntegerToFloat", *operands, domain=CONTRIB)]
    product = graph.call("MatMulInteger", rounded, weight, middle)
    values = [graph.call("Cast", product, to=ir.DataType.FLOAT.value)]
    values.append(graph.call("Mul", values[-1], graph.call("Mul", step, factors)))
    if shift is not None:
        values.append(graph.call("Add", values[-1], shift))
    return [product, *values]


def _per_tensor(lower: Lowering, x: fx.Node) -> tuple[ir.Value, ...]:
    return lower.graph.call_many("DynamicQuantizeLinear", lower.rows(x), count=3)


def _per_token(lower: Lowering, x: fx.Node) -> tuple[ir.Value, ir.Value]:
    """Activations as uint8 around 128, and the scale of every row ``[rows, 1]``."""
    graph, dtype, value = lower.graph, lower.dtype(x), lower.rows(x)
    largest = graph.call("ReduceMax", graph.call("Abs", value), graph.integers(-1), keepdims=1)
    step = graph.call("Mul", largest, graph.constant(1 / 127, dtype))
    step = graph.call("Max", step, graph.constant(_SMALLEST, dtype))
    flat = graph.call("Squeeze", step, graph.integers(1))
    middle = graph.call("Expand", graph.constant(128, torch.uint8), graph.call("Shape", flat))
    return graph.call("QuantizeLinear", value, flat, middle, axis=0), step
