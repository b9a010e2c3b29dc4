"""Elementwise operators of one tensor, and gated activations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from graphwright.backends.onnx.lowering import Lowering
from graphwright.backends.onnx.translations.pointwise import pointwise


def _float(lower: Lowering, node: fx.Node, x: fx.Node) -> torch.dtype:
    """The dtype to compute in: the result's, which torch has promoted already."""
    dtype = lower.dtype(node)
    return dtype if dtype != torch.bool else lower.dtype(x)


def _simple(op: str) -> Callable[..., None]:
    def translate(lower: Lowering, node: fx.Node, x: fx.Node) -> None:
        pointwise(lower, node, [(x, _float(lower, node, x))], lambda value: lower.graph.call(op, value))

    return translate


abs = _simple("Abs")
acos = _simple("Acos")
asin = _simple("Asin")
atan = _simple("Atan")
ceil = _simple("Ceil")
cos = _simple("Cos")
cosh = _simple("Cosh")
erf = _simple("Erf")
exp = _simple("Exp")
floor = _simple("Floor")
hardswish = _simple("HardSwish")
isinf = _simple("IsInf")
isnan = _simple("IsNaN")
log = _simple("Log")
mish = _simple("Mish")
neg = _simple("Neg")
reciprocal = _simple("Reciprocal")
relu = _simple("Relu")
sigmoid = _simple("Sigmoid")
sign = _simple("Sign")
sin = _simple("Sin")
sinh = _simple("Sinh")
sqrt = _simple("Sqrt")
tan = _simple("Tan")
tanh = _simple("Tanh")


def round(lower: Lowering, node: fx.Node, x: fx.Node) -> None:
    """Half to even, in ONNX as in torch; integers stay."""
    if not lower.dtype(node).is_floating_point:
        lower.set_elements(node, lower.elements(x))
        return
    pointwise(lower, node, [(x, lower.dtype(node))], lambda value: lower.graph.call("Round", value))


def _composed(emit: Callable[[Lowering, ir.Value, torch.dtype], ir.Value]) -> Callable[..., None]:
    def translate(lower: Lowering, node: fx.Node, x: fx.Node) -> None:
        dtype = _float(lower, node, x)
        pointwise(lower, node, [(x, dtype)], lambda value: emit(lower, value, dtype))

    return translate


def _constant(lower: Lowering, number: float, dtype: torch.dtype) -> ir.Value:
    return lower.graph.constant(number, dtype)


def _emit_rsqrt(lower: Lowering, x: ir.Value, dtype: torch.dtype) -> ir.Value:
    return lower.graph.call("Reciprocal", lower.graph.call("Sqrt", x))


def _emit_log1p(lower: Lowering, x: ir.Value, dtype: torch.dtype) -> ir.Value:
    return lower.graph.call("Log", lower.graph.call("Add", x, _constant(lower, 1, dtype)))


def _emit_expm1(lower: Lowering, x: ir.Value, dtype: torch.dtype) -> ir.Value:
    return lower.graph.call("Sub", lower.graph.call("Exp", x), _constant(lower, 1, dtype))


def _emit_log2(lower: Lowering, x: ir.Value, dtype: torch.dtype) -> ir.Value:
    return lower.graph.call("Mul", lower.graph.call("Log", x), _constant(lower, 1.4426950408889634, dtype))


def _emit_exp2(lower: Lowering, x: ir.Value, dtype: torch.dtype) -> ir.Value:
    return lower.graph.call("Pow", _constant(lower, 2, dtype), x)


def _emit_square(lower: Lowering, x: ir.Value, dtype: torch.dtype) -> ir.Value:
    return lower.graph.call("Mul", x, x)


def _emit_silu(lower: Lowering, x: ir.Value, dtype: torch.dtype) -> ir.Value:
    return lower.graph.call("Mul", x, lower.graph.call("Sigmoid", x))


def _emit_hardsigmoid(lower: Lowering, x: ir.Value, dtype: torch.dtype) -> ir.Value:
    return lower.graph.call("HardSigmoid", x, alpha=1.0 / 6.0, beta=0.5)


def _emit_relu6(lower: Lowering, x: ir.Value, dtype: torch.dtype) -> ir.Value:
    return lower.graph.call("Clip", x, _constant(lower, 0, dtype), _constant(lower, 6, dtype))


def _emit_trunc(lower: Lowering, x: ir.Value, dtype: torch.dtype) -> ir.Value:
    size = lower.graph.call("Floor", lower.graph.call("Abs", x))
    return lower.graph.call("Mul", lower.graph.call("Sign", x), size)


rsqrt = _composed(_emit_rsqrt)
log1p = _composed(_emit_log1p)
expm1 = _composed(_emit_expm1)
log2 = _composed(_emit_log2)
exp2 = _composed(_emit_exp2)
square = _composed(_emit_square)
silu = _composed(_emit_silu)
hardsigmoid = _composed(_emit_hardsigmoid)
relu6 = _composed(_emit_relu6)
trunc = _composed(_emit_trunc)


def logical_not(lower: Lowering, node: fx.Node, x: fx.Node) -> None:
    """``not x``."""
    pointwise(lower, node, [(x, torch.bool)], lambda value: lower.graph.call("Not", value))


def bitwise_not(lower: Lowering, node: fx.Node, x: fx.Node) -> None:
    """``~x``: logical for booleans."""
    op = "Not" if lower.dtype(x) == torch.bool else "BitwiseNot"
    pointwise(lower, node, [(x, lower.dtype(x))], lambda value: lower.graph.call(op, value))


def gelu(lower: Lowering, node: fx.Node, x: fx.Node, approximate: str = "none") -> None:
    """ONNX Gelu, exact or tanh."""
    dtype = lower.dtype(node)
    pointwise(lower, node, [(x, dtype)], lambda value: _activate(lower, value, _gelu_name(approximate)))


def elu(lower: Lowering, node: fx.Node, x: fx.Node, alpha: float, scale: float, input_scale: float) -> None:
    """ONNX Elu; scaled forms (SELU) are multiplied out."""
    dtype = lower.dtype(node)

    def emit(value: ir.Value) -> ir.Value:
        if scale == 1 and input_scale == 1:
            return lower.graph.call("Elu", value, alpha=float(alpha))
        inner = lower.graph.call("Mul", value, lower.graph.constant(input_scale, dtype))
        low = lower.graph.call("Mul", _emit_expm1(lower, inner, dtype), lower.graph.constant(alpha * scale, dtype))
        high = lower.graph.call("Mul", value, lower.graph.constant(scale, dtype))
        return lower.graph.call("Where", lower.graph.call("Greater", value, _constant(lower, 0, dtype)), high, low)

    pointwise(lower, node, [(x, dtype)], emit)


def leaky_relu(lower: Lowering, node: fx.Node, x: fx.Node, negative_slope: float) -> None:
    """ONNX LeakyRelu."""
    slope = float(negative_slope)
    pointwise(lower, node, [(x, lower.dtype(node))], lambda value: lower.graph.call("LeakyRelu", value, alpha=slope))


def softplus(lower: Lowering, node: fx.Node, x: fx.Node, beta: float, threshold: float) -> None:
    """ONNX Softplus; it is stable by itself, so torch's threshold, above which x is returned, changes nothing."""
    dtype = lower.dtype(node)

    def emit(value: ir.Value) -> ir.Value:
        if beta == 1:
            return lower.graph.call("Softplus", value)
        factor = lower.graph.constant(beta, dtype)
        return lower.graph.call("Div", lower.graph.call("Softplus", lower.graph.call("Mul", value, factor)), factor)

    pointwise(lower, node, [(x, dtype)], emit)


def hardtanh(lower: Lowering, node: fx.Node, x: fx.Node, min_val: Any, max_val: Any) -> None:
    """ONNX Clip."""
    dtype = lower.dtype(node)
    low, high = _constant(lower, min_val, dtype), _constant(lower, max_val, dtype)
    pointwise(lower, node, [(x, dtype)], lambda value: lower.graph.call("Clip", value, low, high))


def gated_activation(lower: Lowering, node: fx.Node, gate: fx.Node, up: fx.Node, activation: str) -> None:
    """``activation(gate) * up``."""
    dtype = lower.dtype(node)
    pointwise(
        lower,
        node,
        [(gate, dtype), (up, dtype)],
        lambda left, right: lower.graph.call("Mul", _activate(lower, left, activation), right),
    )


def _gelu_name(approximate: str) -> str:
    return "gelu" if approximate == "none" else "gelu_tanh"


def _activate(lower: Lowering, x: ir.Value, activation: str) -> ir.Value:
    if activation == "silu":
        return lower.graph.call("Mul", x, lower.graph.call("Sigmoid", x))
    if activation == "relu":
        return lower.graph.call("Relu", x)
    return lower.graph.call("Gelu", x, approximate="tanh" if activation == "gelu_tanh" else None)
