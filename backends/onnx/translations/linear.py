"""Matrix products of float tensors."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from graphwright.backends.onnx.elements import Elements, rows_of
from graphwright.backends.onnx.lowering import Lowering
from graphwright.backends.onnx.sizes import Size, Sizes, product, sizes_of
from graphwright.ir.arguments import argument
from graphwright.ir.names import op_name
from graphwright.ir.ops.kronecker import b_first
from graphwright.ir.provenance import path_of
from graphwright.ir.types import VAL

# Operators that take a tensor apart, and the name of their first argument.
SPLITS = {
    "aten.split.Tensor": "self",
    "aten.split_with_sizes": "self",
    "aten.split.sizes": "self",
    "aten.chunk": "self",
}

_GEMM_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def linear(lower: Lowering, node: fx.Node, x: fx.Node, weight: fx.Node, bias: fx.Node | None = None) -> None:
    """One Gemm on ``[rows, K]``: it takes the weight as torch stores it, and adds the bias on the way.

    The weight keeps its name and layout, so that a tied embedding is stored once. A linear that is only taken apart
    into its parts (q, k and v) is left to the split.
    """
    shape = lower.shape(weight)
    if len(shape) != 2:
        raise lower.refuse(node, f"a linear with a weight of {len(shape)} dimensions is not exported")
    if not is_taken_apart(node):
        _whole(lower, node, x, weight, bias)


def put_together(lower: Lowering, node: fx.Node) -> None:
    """Compute a linear that was left to the split, for a reader of the whole."""
    if not lower.is_computed(node):
        scope, lower.graph.scope = lower.graph.scope, path_of(node)
        _whole(lower, node, *(argument(node, each) for each in ("input", "weight", "bias")))
        lower.graph.scope = scope


def _whole(lower: Lowering, node: fx.Node, x: fx.Node, weight: fx.Node, bias: fx.Node | None) -> None:
    operands = [lower.rows(x), lower.tensor(weight)]
    if bias is not None:
        operands.append(lower.tensor(bias))
    lower.set_rows(node, lower.graph.call("Gemm", *operands, transB=1))


def is_taken_apart(node: fx.Node) -> bool:
    """Whether a node is a linear on stored weights that one split along the last dimension reads, and nothing else.

    One Gemm and a Split are slower than a Gemm for each part: the runtime copies the parts (5 % of MiniLM's time).
    """
    if op_name(node) != "aten.linear" or len(node.users) != 1:
        return False
    user = next(iter(node.users))
    if op_name(user) not in SPLITS or argument(user, SPLITS[op_name(user)]) is not node:
        return False
    stored = (argument(node, "weight"), argument(node, "bias"))
    is_last = argument(user, "dim") in (-1, node.meta[VAL].dim() - 1)
    return is_last and all(each is None or each.op == "get_attr" for each in stored)


def parts(lower: Lowering, split: fx.Node, node: fx.Node) -> list[tuple[Sizes, ir.Value]]:
    """A linear that is taken apart, as one Gemm for each part: shape ``[rows, part]`` and value."""
    scope, lower.graph.scope = lower.graph.scope, path_of(node)
    weight, bias = argument(node, "weight"), argument(node, "bias")
    results: list[tuple[Sizes, ir.Value]] = []
    start = 0
    for fake in split.meta[VAL]:
        rows = rows_of(sizes_of(fake))
        assert rows is not None
        stop = start + rows[1]
        stored = [
            lower.graph.weight(f"{each.target}[{start}:{stop}]", lower.program.tensor(each).detach()[start:stop])
            for each in (weight, bias)
            if each is not None
        ]
        operands = [lower.rows(argument(node, "input")), *stored]
        results.append((rows, lower.graph.call("Gemm", *operands, transB=1)))
        start = stop
    lower.graph.scope = scope
    return results


def mm(lower: Lowering, node: fx.Node, a: fx.Node, b: fx.Node, *arguments: Any) -> None:
    """Product of two matrices."""
    del arguments
    lower.set(node, lower.graph.call("MatMul", lower.tensor(a), lower.tensor(b)))


matmul = bmm = mm


def addmm(lower: Lowering, node: fx.Node, c: fx.Node, a: fx.Node, b: fx.Node, beta: Any = 1, alpha: Any = 1) -> None:
    """``beta * c + alpha * a @ b``: Gemm. Read ``[rows, N]`` by a view, it is not reshaped in between."""
    if lower.dtype(node) not in _GEMM_DTYPES:
        raise lower.refuse(node, f"addmm of {lower.dtype(node)} is not exported")
    value = lower.graph.call(
        "Gemm", lower.tensor(a), lower.tensor(b), lower.tensor(c), alpha=float(alpha), beta=float(beta)
    )
    lower.set(node, value)


def baddbmm(lower: Lowering, node: fx.Node, c: fx.Node, a: fx.Node, b: fx.Node, beta: Any = 1, alpha: Any = 1) -> None:
    """``beta * c + alpha * a @ b`` of batches."""
    dtype = lower.dtype(node)

    def scaled(value: ir.Value, factor: Any) -> ir.Value:
        return value if factor == 1 else lower.graph.call("Mul", value, lower.graph.constant(factor, dtype))

    product = scaled(lower.graph.call("MatMul", lower.tensor(a), lower.tensor(b)), alpha)
    lower.set(node, product if beta == 0 else lower.graph.call("Add", product, scaled(lower.tensor(c), beta)))


def kron_linear(lower: Lowering, node: fx.Node, x: fx.Node, a: fx.Node, b: fx.Node, scale: float = 1.0) -> None:
    """``A X Bᵀ`` on rows as matrices, the cheaper product first; the Kronecker product is never formed."""
    (a1, a2), (b1, b2) = lower.shape(a), lower.shape(b)
    count = product(lower.shape(x)[:-1])

    def times_b(elements: Elements, rows: Size) -> Elements:
        """Every row of every matrix: one Gemm, which takes B as it is stored."""
        value = lower.graph.call("Gemm", elements.get((rows, b2)), lower.tensor(b), transB=1)
        return Elements.of(lower.graph, lower.sizes, (rows, b1), value)

    def times_a(elements: Elements, columns: Size) -> Elements:
        value = lower.graph.call("MatMul", lower.tensor(a), elements.get((count, a2, columns)))
        return Elements.of(lower.graph, lower.sizes, (count, a1, columns), value)

    if b_first((a1, a2), (b1, b2)):
        result = times_a(times_b(lower.elements(x), product((count, a2))), b1)
    else:
        result = times_b(times_a(lower.elements(x), b2), product((count, a1)))
    if scale == 1.0:
        lower.set_elements(node, result)
        return
    rows = (count, product((a1, b1)))
    value = lower.graph.call("Mul", result.get(rows), lower.graph.constant(scale, lower.dtype(node)))
    lower.set(node, value, rows)
