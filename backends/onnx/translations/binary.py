"""Elementwise operators of two operands: arithmetic, comparisons, logic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from graphwright.backends.onnx.lowering import Lowering
from graphwright.backends.onnx.translations.pointwise import pointwise
from graphwright.ir.types import VAL

# On booleans + is "or" and * is "and".
_BOOLEAN = {"Add": "Or", "Mul": "And"}


def _emit(lower: Lowering, node: fx.Node, a: Any, b: Any, op: str) -> None:
    dtype = lower.dtype(node)
    if dtype == torch.bool:
        op = _BOOLEAN[op]
    pointwise(lower, node, [(a, dtype), (b, dtype)], lambda left, right: lower.graph.call(op, left, right))


def _scaled(lower: Lowering, node: fx.Node, a: Any, b: Any, alpha: Any, op: str) -> None:
    if alpha == 1:
        _emit(lower, node, a, b, op)
        return
    dtype = lower.dtype(node)
    factor = lower.graph.constant(alpha, dtype)
    pointwise(
        lower,
        node,
        [(a, dtype), (b, dtype)],
        lambda left, right: lower.graph.call(op, left, lower.graph.call("Mul", right, factor)),
    )


def add(lower: Lowering, node: fx.Node, a: Any, b: Any, alpha: Any = 1) -> None:
    """``a + alpha * b``."""
    _scaled(lower, node, a, b, alpha, "Add")


def sub(lower: Lowering, node: fx.Node, a: Any, b: Any, alpha: Any = 1) -> None:
    """``a - alpha * b``."""
    _scaled(lower, node, a, b, alpha, "Sub")


def rsub(lower: Lowering, node: fx.Node, a: Any, b: Any, alpha: Any = 1) -> None:
    """``b - alpha * a``."""
    _scaled(lower, node, b, a, alpha, "Sub")


def mul(lower: Lowering, node: fx.Node, a: Any, b: Any) -> None:
    """``a * b``."""
    _emit(lower, node, a, b, "Mul")


def div(lower: Lowering, node: fx.Node, a: Any, b: Any, rounding_mode: str | None = None) -> None:
    """``a / b``, rounded down or towards zero when asked for."""
    if rounding_mode is None:
        _emit(lower, node, a, b, "Div")
        return
    dtype = lower.dtype(node)
    graph = lower.graph

    def emit(left: ir.Value, right: ir.Value) -> ir.Value:
        if not dtype.is_floating_point:
            # ONNX Div rounds integers towards zero; Mod has the divisor's sign, as floor division needs.
            whole = graph.call("Sub", left, graph.call("Mod", left, right)) if rounding_mode == "floor" else left
            return graph.call("Div", whole, right)
        quotient = graph.call("Div", left, right)
        if rounding_mode == "floor":
            return graph.call("Floor", quotient)
        return graph.call("Mul", graph.call("Sign", quotient), graph.call("Floor", graph.call("Abs", quotient)))

    pointwise(lower, node, [(a, dtype), (b, dtype)], emit)


def floor_divide(lower: Lowering, node: fx.Node, a: Any, b: Any) -> None:
    """``a // b``."""
    div(lower, node, a, b, "floor")


def remainder(lower: Lowering, node: fx.Node, a: Any, b: Any) -> None:
    """``a % b`` with the sign of b."""
    dtype = lower.dtype(node)
    graph = lower.graph

    def emit(left: ir.Value, right: ir.Value) -> ir.Value:
        if not dtype.is_floating_point:
            return graph.call("Mod", left, right)
        whole = graph.call("Floor", graph.call("Div", left, right))
        return graph.call("Sub", left, graph.call("Mul", whole, right))

    pointwise(lower, node, [(a, dtype), (b, dtype)], emit)


def fmod(lower: Lowering, node: fx.Node, a: Any, b: Any) -> None:
    """C's fmod: the sign of a."""
    dtype = lower.dtype(node)
    pointwise(lower, node, [(a, dtype), (b, dtype)], lambda left, right: lower.graph.call("Mod", left, right, fmod=1))


def pow(lower: Lowering, node: fx.Node, a: Any, b: Any) -> None:
    """``a ** b``; small constant exponents without the general power."""
    dtype = lower.dtype(node)
    graph = lower.graph
    if isinstance(b, int | float) and not isinstance(b, bool) and b in (0.5, 1, 2, 3, -0.5, -1):

        def emit(x: ir.Value) -> ir.Value:
            if abs(b) == 0.5:
                x = graph.call("Sqrt", x)
            elif b == 2:
                return graph.call("Mul", x, x)
            elif b == 3:
                return graph.call("Mul", graph.call("Mul", x, x), x)
            return graph.call("Reciprocal", x) if b < 0 else x

        if b == 1 and isinstance(a, fx.Node) and lower.dtype(a) == dtype:
            lower.set_elements(node, lower.elements(a))
            return
        pointwise(lower, node, [(a, dtype)], emit)
        return
    pointwise(lower, node, [(a, dtype), (b, dtype)], lambda left, right: graph.call("Pow", left, right))


def maximum(lower: Lowering, node: fx.Node, a: Any, b: Any) -> None:
    """Elementwise maximum."""
    _extreme(lower, node, a, b, "Max")


def minimum(lower: Lowering, node: fx.Node, a: Any, b: Any) -> None:
    """Elementwise minimum."""
    _extreme(lower, node, a, b, "Min")


def _extreme(lower: Lowering, node: fx.Node, a: Any, b: Any, op: str) -> None:
    dtype = lower.dtype(node)
    if dtype == torch.bool:
        op = "Or" if op == "Max" else "And"
    pointwise(lower, node, [(a, dtype), (b, dtype)], lambda left, right: lower.graph.call(op, left, right))


# -- comparisons -------------------------------------------------------------------------------------------------------


def _common(a: Any, b: Any) -> torch.dtype:
    """The dtype in which torch compares the two."""
    values = [item.meta[VAL] if isinstance(item, fx.Node) else item for item in (a, b)]
    return torch.result_type(*values)


def _comparison(op: str, *, ordered: bool = True, negated: bool = False) -> Callable[..., None]:
    def translate(lower: Lowering, node: fx.Node, a: Any, b: Any) -> None:
        dtype = _common(a, b)
        if dtype == torch.bool and ordered:
            dtype = torch.int64

        def emit(left: ir.Value, right: ir.Value) -> ir.Value:
            result = lower.graph.call(op, left, right)
            return lower.graph.call("Not", result) if negated else result

        pointwise(lower, node, [(a, dtype), (b, dtype)], emit)

    return translate


eq = _comparison("Equal", ordered=False)
ne = _comparison("Equal", ordered=False, negated=True)
lt = _comparison("Less")
le = _comparison("LessOrEqual")
gt = _comparison("Greater")
ge = _comparison("GreaterOrEqual")


# -- logic -------------------------------------------------------------------------------------------------------------


def _logic(op: str) -> Callable[..., None]:
    def translate(lower: Lowering, node: fx.Node, a: Any, b: Any) -> None:
        pointwise(
            lower, node, [(a, torch.bool), (b, torch.bool)], lambda left, right: lower.graph.call(op, left, right)
        )

    return translate


def _bitwise(logical: str) -> Callable[..., None]:
    def translate(lower: Lowering, node: fx.Node, a: Any, b: Any) -> None:
        dtype = lower.dtype(node)
        op = logical if dtype == torch.bool else f"Bitwise{logical}"
        pointwise(lower, node, [(a, dtype), (b, dtype)], lambda left, right: lower.graph.call(op, left, right))

    return translate


logical_and = _logic("And")
logical_or = _logic("Or")
logical_xor = _logic("Xor")
bitwise_and = _bitwise("And")
bitwise_or = _bitwise("Or")
bitwise_xor = _bitwise("Xor")
