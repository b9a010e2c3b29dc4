"""Linears on sparse weights."""

from __future__ import annotations

import torch
from torch import fx

from graphwright.backends.onnx.lowering import Lowering


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
