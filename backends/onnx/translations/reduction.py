"""Reductions, softmax and cumulative sums."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from graphwright.backends.onnx.lowering import Lowering
from graphwright.backends.onnx.sizes import sizes_of
from graphwright.ir.names import op_name
from graphwright.ir.types import VAL

_EXTREME_KINDS = (torch.float32, torch.float64, torch.int32, torch.int64, torch.float16)


def _axes(lower: Lowering, x: fx.Node, dim: Any) -> list[int]:
    rank = len(lower.shape(x))
    dims = [dim] if isinstance(dim, int) else list(dim or [])
    return [each % rank for each in dims] if dims else list(range(rank))


def _reduce(lower: Lowering, op: str, value: ir.Value, axes: Sequence[int], keepdim: bool) -> ir.Value:
    if not axes:
        return value
    return lower.graph.call(op, value, lower.graph.integers(*axes), keepdims=int(keepdim))


def _reduction(op: str) -> Callable[..., None]:
    def translate(
        lower: Lowering, node: fx.Node, x: fx.Node, dim: Any = None, keepdim: bool = False, *rest: Any
    ) -> None:
        del rest
        dtype = lower.dtype(node)
        lower.set(node, _reduce(lower, op, lower.tensor(x, dtype), _axes(lower, x, dim), keepdim))

    return translate


def total(lower: Lowering, node: fx.Node, x: fx.Node, dtype: Any = None) -> None:
    """The sum or mean of all elements."""
    del dtype
    op = "ReduceMean" if op_name(node) == "aten.mean" else "ReduceSum"
    lower.set(node, _reduce(lower, op, lower.tensor(x, lower.dtype(node)), _axes(lower, x, None), False))


mean = _reduction("ReduceMean")
sum = _reduction("ReduceSum")
prod = _reduction("ReduceProd")
amax = _reduction("ReduceMax")
amin = _reduction("ReduceMin")
logsumexp = _reduction("ReduceLogSumExp")


def _extreme(op: str, position: str) -> Callable[..., None]:
    def translate(lower: Lowering, node: fx.Node, x: fx.Node, dim: int | None = None, keepdim: bool = False) -> None:
        value = lower.tensor(x)
        if dim is None:
            lower.set(node, _reduce(lower, op, value, _axes(lower, x, None), False))
            return
        axis = dim % len(lower.shape(x))
        index = lower.graph.call(position, value, axis=axis, keepdims=int(keepdim))
        shapes = [sizes_of(fake) for fake in node.meta[VAL]]
        lower.set_tuple(node, [(shapes[0], _reduce(lower, op, value, [axis], keepdim)), (shapes[1], index)])

    return translate


max = _extreme("ReduceMax", "ArgMax")
min = _extreme("ReduceMin", "ArgMin")


def _position(op: str) -> Callable[..., None]:
    def translate(lower: Lowering, node: fx.Node, x: fx.Node, dim: int | None = None, keepdim: bool = False) -> None:
        dtype = lower.dtype(x)
        kind = dtype if dtype in _EXTREME_KINDS else torch.int64
        if dim is None:
            flat = lower.graph.call("Reshape", lower.tensor(x, kind), lower.graph.integers(-1))
            lower.set(node, lower.graph.call(op, flat, axis=0, keepdims=0))
            return
        axis = dim % len(lower.shape(x))
        lower.set(node, lower.graph.call(op, lower.tensor(x, kind), axis=axis, keepdims=int(keepdim)))

    return translate


argmax = _position("ArgMax")
argmin = _position("ArgMin")


def _test(op: str) -> Callable[..., None]:
    def translate(lower: Lowering, node: fx.Node, x: fx.Node, dim: Any = None, keepdim: bool = False) -> None:
        ones = lower.cast(lower.tensor(x, torch.bool), torch.bool, torch.int32)
        found = _reduce(lower, op, ones, _axes(lower, x, dim), keepdim)
        lower.set(node, lower.cast(found, torch.int32, torch.bool))

    return translate


any = _test("ReduceMax")
all = _test("ReduceMin")


def cumsum(lower: Lowering, node: fx.Node, x: fx.Node, dim: int, dtype: Any = None) -> None:
    """ONNX CumSum."""
    del dtype
    axis = lower.graph.constant(dim % len(lower.shape(x)), torch.int64)
    lower.set(node, lower.graph.call("CumSum", lower.tensor(x, lower.dtype(node)), axis))


def _softmax(op: str) -> Callable[..., None]:
    def translate(lower: Lowering, node: fx.Node, x: fx.Node, dim: int, dtype: Any = None) -> None:
        del dtype
        value = lower.tensor(x, lower.dtype(node))
        lower.set(node, lower.graph.call(op, value, axis=dim % len(lower.shape(x))))

    return translate


softmax = _softmax("Softmax")
log_softmax = _softmax("LogSoftmax")


def var(lower: Lowering, node: fx.Node, x: fx.Node, dim: Any, correction: Any, keepdim: bool) -> None:
    """The mean of squared deviations, with torch's correction of the divisor."""
    lower.set(node, _variance(lower, node, x, dim, correction, keepdim))


def var_dim(lower: Lowering, node: fx.Node, x: fx.Node, dim: Any, unbiased: bool, keepdim: bool) -> None:
    """The variance with a divisor of n or n - 1."""
    lower.set(node, _variance(lower, node, x, dim, int(unbiased), keepdim))


def std_dim(lower: Lowering, node: fx.Node, x: fx.Node, dim: Any, unbiased: bool, keepdim: bool) -> None:
    """The root of that variance."""
    lower.set(node, lower.graph.call("Sqrt", _variance(lower, node, x, dim, int(unbiased), keepdim)))


def std(lower: Lowering, node: fx.Node, x: fx.Node, dim: Any, correction: Any, keepdim: bool) -> None:
    """The root of the variance."""
    lower.set(node, lower.graph.call("Sqrt", _variance(lower, node, x, dim, correction, keepdim)))


def _variance(lower: Lowering, node: fx.Node, x: fx.Node, dim: Any, correction: Any, keepdim: bool) -> ir.Value:
    axes, dtype = _axes(lower, x, dim), lower.dtype(node)
    count = 1
    for axis in axes:
        size = lower.shape(x)[axis]
        if not isinstance(size, int):
            raise lower.refuse(node, "the variance over a dimension that varies from call to call is not exported")
        count *= size
    value = lower.tensor(x, dtype)
    centred = lower.graph.call("Sub", value, _reduce(lower, "ReduceMean", value, axes, True))
    total = _reduce(lower, "ReduceSum", lower.graph.call("Mul", centred, centred), axes, keepdim)
    divisor = count - (1 if correction is None else correction)
    return lower.graph.call("Div", total, lower.graph.constant(divisor, dtype))


def linalg_vector_norm(
    lower: Lowering, node: fx.Node, x: fx.Node, order: Any, dim: Any, keepdim: bool, dtype: Any = None
) -> None:
    """The 1- and 2-norm."""
    del dtype
    if order not in (1, 2):
        raise lower.refuse(node, f"the vector norm of order {order} is not exported")
    value = lower.tensor(x, node.meta[VAL].dtype)
    lower.set(node, _reduce(lower, f"ReduceL{int(order)}", value, _axes(lower, x, dim), keepdim))
