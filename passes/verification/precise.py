"""Running a program in float64, node by node, without a float64 copy of its weights.

In float64 rounding is nine orders of magnitude below float32's, so what is left of a difference between two programs is
a difference in what they compute, not in how they round.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import fx
from torch.nn import functional

from graphwright.ir.arguments import argument
from graphwright.ir.mapped import streaming
from graphwright.ir.names import op_name
from graphwright.ir.program import Program
from graphwright.ir.types import TensorType

# A weight is widened in slices of about this many elements, so that the largest layer does not double the memory and a
# slice is still in the cache when it is multiplied.
_SLICE_ELEMENTS = 1 << 20

_scratch = threading.local()


def run_node(program: Program, node: fx.Node, value_of: Callable[[fx.Node], Any]) -> Any:
    """The value of one call in float64, given the values of its operands.

    Every floating operand is widened and every floating dtype argument is replaced by float64; integers stay as they
    are.
    """
    if op_name(node) == "aten.linear":
        return _linear(node, value_of)
    if op_name(node) == "aten.embedding":
        return wide(_call(node, value_of, widen_tensors=False))
    if op_name(node) == "aten.rms_norm" and argument(node, "eps") is None:
        return _rms_norm(program, node, value_of)
    return wide(_call(node, value_of, widen_tensors=True))


def run(program: Program, inputs: list[torch.Tensor]) -> dict[str, Any]:
    """The value of every used node by name, in float64; weights are left out."""
    values: dict[str, Any] = {}
    flat = iter(inputs)

    def value_of(node: fx.Node) -> Any:
        return program.tensor(node) if node.op == "get_attr" else values[node.name]

    with torch.no_grad(), streaming(program.tensors().values()):
        for node in program.nodes:
            if node.op == "placeholder":
                values[node.name] = wide(next(flat))
            elif node.op == "call_function" and node.users:
                values[node.name] = run_node(program, node, value_of)
    return values


def wide(value: Any) -> Any:
    """Floating tensors as float64, in any nesting."""
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() and value.dtype != torch.float64 else value
    if isinstance(value, tuple | list):
        return type(value)(wide(item) for item in value)
    return value


def _call(node: fx.Node, value_of: Callable[[fx.Node], Any], *, widen_tensors: bool) -> Any:
    function, given = cast(Callable[..., Any], node.target), (value_of, widen_tensors)
    args = [_operand(item, *given) for item in node.args]
    return function(*args, **{key: _operand(item, *given) for key, item in node.kwargs.items()})


# Not inside `_call`: a function that calls itself is a cycle there, and keeps all values until garbage is collected.
def _operand(item: Any, value_of: Callable[[fx.Node], Any], widen_tensors: bool) -> Any:
    if isinstance(item, fx.Node):
        return wide(value_of(item)) if widen_tensors else value_of(item)
    if isinstance(item, torch.dtype) and item.is_floating_point:
        return torch.float64
    if isinstance(item, list | tuple):
        return [_operand(part, value_of, widen_tensors) for part in item]
    if isinstance(item, Mapping):
        return {key: _operand(part, value_of, widen_tensors) for key, part in item.items()}
    return item


def _linear(node: fx.Node, value_of: Callable[[fx.Node], Any]) -> torch.Tensor:
    x = wide(value_of(argument(node, "input")))
    weight = value_of(argument(node, "weight"))
    bias_node = argument(node, "bias")
    bias = wide(value_of(bias_node)) if bias_node is not None else None
    if weight.dim() != 2:
        return functional.linear(x, wide(weight), bias)
    rows = max(1, _SLICE_ELEMENTS // max(1, weight.shape[1]))
    slices = [weight[start : start + rows] for start in range(0, weight.shape[0], rows)]
    parts = [functional.linear(x, _in_scratch(piece)) for piece in slices]
    result = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
    return result + bias if bias is not None else result


def _in_scratch(weight: torch.Tensor) -> torch.Tensor:
    """A slice of a weight in float64, valid until the next call on this thread.

    One buffer serves for all: with a fresh one for each layer, the small values that are kept in between cut up the
    space it leaves behind, and a model of a billion parameters needs a gigabyte more.
    """
    if weight.device.type != "cpu":
        return weight.double()
    buffer: torch.Tensor | None = getattr(_scratch, "buffer", None)
    if buffer is None or buffer.numel() < weight.numel():
        buffer = _scratch.buffer = torch.empty(max(weight.numel(), _SLICE_ELEMENTS), dtype=torch.float64)
    return buffer[: weight.numel()].view(weight.shape).copy_(weight.detach())


def _rms_norm(program: Program, node: fx.Node, value_of: Callable[[fx.Node], Any]) -> torch.Tensor:
    """Without an epsilon torch takes that of the dtype it computes in, which in float64 would be another one."""
    kind = program.type_of(node)
    assert isinstance(kind, TensorType)
    eps = torch.finfo(torch.promote_types(kind.dtype, torch.float32)).eps
    weight = argument(node, "weight")
    operands = wide(value_of(argument(node, "input"))), argument(node, "normalized_shape")
    return functional.rms_norm(*operands, wide(value_of(weight)) if weight is not None else None, eps)
