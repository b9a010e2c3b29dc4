"""Linears on int8 weights whose activations are rounded to 8 bits, on a stored grid or on one made as they come.

One rounding serves every linear that reads the same tensor. The runtime's integer kernels take one zero point for all
rows; one per row ("per token") comes in afterwards: with codes ``c``, row zero points ``z`` and any constant ``m``,

    sum (c - z) w = sum (c - m) w - (z - m) sum w

so a product with the constant 128, and a correction of rank one that joins the bias in one small Gemm.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch import fx

from graphwright.backends.onnx.graph import CONTRIB
from graphwright.backends.onnx.lowering import Lowering
from graphwright.backends.onnx.sizes import Size, product

# What the kernels subtract from every code. In the middle of the range, so that sums stay small in float32.
_MIDDLE = 128
_LEVELS = 255
# Added to every scale: nothing to those of values that matter, and no division by zero.
_SMALLEST = 1e-30


@dataclass(frozen=True)
class Int8Weight:
    """A stored weight.

    Attributes:
        name: what its initialisers are named after.
        outputs, columns: of the matrix.
        make: gives it, int8 ``[out, in]``.
    """

    name: str
    outputs: int
    columns: int
    make: Callable[[], torch.Tensor]


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
    that takes one scale and zero point per row. Weights are stored unsigned, with a zero point of 128: for signed ones
    onnxruntime adds pairs of products up in 16 bits on x86 without VNNI, and they overflow. ``vnni`` leaves them
    signed. Activations are unsigned always: signed ones are ten times slower (onnxruntime 1.31, CPU).

    Raises:
        ExportError: the weights are computed, not stored, or the activations are not float32.
    """
    multiply_dynamic(lower, node, x, _stored(lower, node, qweight), scales, bias, activation)


def linear_int8_static(
    lower: Lowering,
    node: fx.Node,
    x: fx.Node,
    qweight: fx.Node,
    scales: fx.Node,
    bias: fx.Node | None,
    input_scales: fx.Node,
    input_zero_point: int,
) -> None:
    """As :func:`linear_int8_dynamic`, on codes from one ``QuantizeLinear`` with stored scale and zero point.

    Scales of features are multiplied out before it: the runtime's kernel takes one value at a time when the axis of the
    scales is the last.

    Raises:
        ExportError: weights or scales are computed, not stored, or the activations are not float32.
    """
    weight = _stored(lower, node, qweight)
    multiply_static(lower, node, x, weight, scales, bias, input_scales, input_zero_point)


def multiply_dynamic(
    lower: Lowering,
    node: fx.Node,
    x: fx.Node,
    weight: Int8Weight,
    scales: fx.Node,
    bias: fx.Node | None,
    activation: str,
) -> None:
    """What :func:`linear_int8_dynamic` writes, on a weight that need not be stored so.

    Raises:
        ExportError: the scales are computed, not stored, or the activations are not float32.
    """
    matrix, factors, shift = _operands(lower, node, weight, scales, bias)
    if activation == "per_tensor":
        key = ("per tensor", lower.elements(x))
        codes, step, zero = lower.once(key, lambda: _per_tensor(lower, x))
        values = _product(lower, codes, matrix, step, factors, zero, shift)
        result = values[-1]
    else:
        codes, step, correction = lower.once(("per token", lower.elements(x)), lambda: _per_token(lower, x))
        one, middle = lower.graph.constant(1.0, torch.float32), lower.graph.constant(_MIDDLE, torch.uint8)
        values = _product(lower, codes, matrix, one, factors, middle, None)
        values.append(lower.graph.call("Mul", values[-1], step))
        columns = _columns(lower, weight, scales, bias)
        result = lower.graph.call("Gemm", correction, columns, values[-1])
    lower.set_rows(node, result)
    lower.expect(node, "MatMulIntegerToFloat", values)


def multiply_static(
    lower: Lowering,
    node: fx.Node,
    x: fx.Node,
    weight: Int8Weight,
    scales: fx.Node,
    bias: fx.Node | None,
    input_scales: fx.Node,
    input_zero_point: int,
) -> None:
    """What :func:`linear_int8_static` writes, on a weight that need not be stored so.

    Raises:
        ExportError: scales are computed, not stored, or the activations are not float32.
    """
    matrix, factors, shift = _operands(lower, node, weight, scales, bias)
    if input_scales.op != "get_attr":
        raise lower.refuse(node, "the scales of the input must be stored, here they are computed")
    key = ("static", lower.elements(x), str(input_scales.target), input_zero_point)
    codes, zero = lower.once(key, lambda: _static(lower, x, input_scales, input_zero_point))
    one = lower.graph.constant(1.0, torch.float32)
    values = _product(lower, codes, matrix, one, factors, zero, shift)
    lower.set_rows(node, values[-1])
    lower.expect(node, "MatMulIntegerToFloat", values)


def _stored(lower: Lowering, node: fx.Node, qweight: fx.Node) -> Int8Weight:
    if qweight.op != "get_attr":
        raise lower.refuse(node, "quantised weights must be stored, here they are computed")
    stored = lower.program.tensor(qweight).detach()
    return Int8Weight(str(qweight.target), len(stored), stored.shape[1], lambda: stored)


def _operands(
    lower: Lowering, node: fx.Node, weight: Int8Weight, scales: fx.Node, bias: fx.Node | None
) -> tuple[ir.Value, ir.Value, ir.Value | None]:
    """Weight ``[in, out]`` (signed, or unsigned about 128), scales and bias."""
    if scales.op != "get_attr":
        raise lower.refuse(node, "the scales of quantised weights must be stored, here they are computed")
    if lower.dtype(node) != torch.float32:
        raise lower.refuse(node, f"the runtime rounds float32 activations only, not {lower.dtype(node)}")
    shape = weight.columns, weight.outputs
    signed = lower.options.vnni
    dtype, name = (torch.int8, "transposed") if signed else (torch.uint8, "unsigned")

    def make() -> torch.Tensor:
        codes = weight.make().t()
        return codes if signed else (codes.to(torch.int16) + _MIDDLE).to(torch.uint8)

    matrix = lower.graph.derived(f"{weight.name}.{name}", dtype, shape, make)
    shift = lower.tensor(bias, torch.float32) if bias is not None else None
    return matrix, lower.tensor(scales, torch.float32), shift


def _static(lower: Lowering, x: fx.Node, input_scales: fx.Node, input_zero_point: int) -> tuple[ir.Value, ir.Value]:
    """Codes and zero point."""
    graph, value, scales = lower.graph, lower.rows(x), lower.program.tensor(input_scales).detach().float()
    zero, step = graph.constant(input_zero_point, torch.uint8), graph.constant(1.0, torch.float32)
    if bool((scales == scales[0]).all()):
        step = graph.constant(float(scales[0]), torch.float32)
    else:
        name = f"{input_scales.target}.reciprocal"
        value = graph.call("Mul", value, graph.derived(name, torch.float32, tuple(scales.shape), scales.reciprocal))
    return graph.call("QuantizeLinear", value, step, zero), zero


def _product(
    lower: Lowering,
    codes: ir.Value,
    weight: ir.Value,
    step: ir.Value,
    factors: ir.Value,
    zero: ir.Value,
    shift: ir.Value | None,
) -> list[ir.Value]:
    """``(codes - zero) @ weight * step * factors + shift``; gives every value up to the result."""
    graph = lower.graph
    middle = None if lower.options.vnni else graph.constant(_MIDDLE, torch.uint8)
    if lower.options.has_contrib:
        operands = [codes, weight, step, factors, zero, middle, shift]
        return [graph.call("MatMulIntegerToFloat", *operands, domain=CONTRIB)]
    product = graph.call("MatMulInteger", codes, weight, zero, middle)
    values = [product, graph.call("Cast", product, to=ir.DataType.FLOAT.value)]
    values.append(graph.call("Mul", values[-1], graph.call("Mul", step, factors)))
    if shift is not None:
        values.append(graph.call("Add", values[-1], shift))
    return values


def _per_tensor(lower: Lowering, x: fx.Node) -> tuple[ir.Value, ...]:
    return lower.graph.call_many("DynamicQuantizeLinear", lower.rows(x), count=3)


def _per_token(lower: Lowering, x: fx.Node) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Codes, the scale of every row ``[rows, 1]``, and the left factor of the correction ``[rows, 2]``.

    On vectors the size of a batch the runtime's comparisons and selections take longer than its arithmetic, so the
    clamping is done by Relu, and the zero points are rounded and multiplied out by (De)QuantizeLinear.
    """
    graph, value = lower.graph, lower.rows(x)
    last = graph.integers(-1)
    low = graph.call("Relu", graph.call("Neg", graph.call("ReduceMin", value, last, keepdims=0)))
    high = graph.call("Relu", graph.call("ReduceMax", value, last, keepdims=0))
    step = graph.call("Div", graph.call("Add", high, low), graph.constant(float(_LEVELS), torch.float32))
    # A row of zeros has no scale; any other will do.
    step = graph.call("Add", step, graph.constant(_SMALLEST, torch.float32))
    zero = graph.call("QuantizeLinear", low, step, axis=0)
    codes = graph.call("QuantizeLinear", value, step, zero, axis=0)
    rows = product(lower.shape(x)[:-1])
    scope, graph.scope = graph.scope, "sizes"
    ones, middles = lower.once(("per row", rows), lambda: _per_row(lower, rows))
    graph.scope = scope
    offset = graph.call("DequantizeLinear", zero, step, middles, axis=0)
    offset = graph.call("Unsqueeze", offset, last)
    return codes, graph.call("Unsqueeze", step, last), graph.call("Concat", offset, ones, axis=1)


def _per_row(lower: Lowering, rows: Size) -> tuple[ir.Value, ir.Value]:
    """Ones ``[rows, 1]`` and zero points ``[rows]``."""
    graph = lower.graph
    ones = graph.call("Expand", graph.constant(1.0, torch.float32), lower.sizes.vector((rows, 1)))
    middles = graph.call("Expand", graph.constant(_MIDDLE, torch.uint8), lower.sizes.vector((rows,)))
    return ones, middles


def _columns(lower: Lowering, weight: Int8Weight, scales: fx.Node, bias: fx.Node | None) -> ir.Value:
    """The right factor of the correction, ``[2, N]``: what a zero point takes from each output, and the bias."""
    factors = lower.program.tensor(scales).detach()

    def make() -> torch.Tensor:
        sums = weight.make().sum(dim=1, dtype=torch.int64).double() * factors.double()
        shift = lower.program.tensor(bias).detach().double() if bias is not None else torch.zeros_like(sums)
        return torch.stack((-sums, shift)).float()

    return lower.graph.derived(f"{weight.name}.correction", torch.float32, (2, weight.outputs), make)
