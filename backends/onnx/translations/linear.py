"""Matrix products of float tensors."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from graphwright.backends.onnx.lowering import Lowering

_GEMM_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def linear(lower: Lowering, node: fx.Node, x: fx.Node, weight: fx.Node, bias: fx.Node | None = None) -> None:
    """One Gemm on ``[rows, K]``: it takes the weight as torch stores it, and adds the bias on the way.

    The weight keeps its name and layout, so that a tied embedding is stored once.
    """
    shape = lower.shape(weight)
    if len(shape) != 2:
        raise lower.refuse(node, f"a linear with a weight of {len(shape)} dimensions is not exported")
    operands = [lower.rows(x), lower.tensor(weight)]
    if bias is not None:
        operands.append(lower.tensor(bias))
    lower.set_rows(node, lower.graph.call("Gemm", *operands, transB=1))


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
