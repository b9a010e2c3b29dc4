"""Elementwise operators in whichever shape their operands already have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from graphwright.backends.onnx.elements import rows_of
from graphwright.backends.onnx.lowering import Lowering
from graphwright.ir.types import is_tensor


def pointwise(
    lower: Lowering,
    node: fx.Node,
    operands: Sequence[tuple[Any, torch.dtype]],
    emit: Callable[..., ir.Value],
) -> None:
    """Emit an elementwise operator and set its result.

    It is computed on ``[rows, last]`` when an operand exists only so (the result of a linear), else in the node's own
    shape.

    Args:
        lower: the lowering.
        node: the node translated.
        operands: tensors, numbers or sizes, each with the dtype it is wanted in.
        emit: makes the ONNX nodes from the operands' values.
    """
    shape = lower.shape(node)
    rows = rows_of(shape)
    if rows is not None and rows != shape and _prefers_rows(lower, node, [value for value, _ in operands]):
        values = [_in_rows(lower, node, value, dtype) for value, dtype in operands]
        lower.set(node, emit(*values), rows)
        return
    lower.set(node, emit(*[lower.operand(value, dtype) for value, dtype in operands]))


def _prefers_rows(lower: Lowering, node: fx.Node, operands: Sequence[Any]) -> bool:
    shape = lower.shape(node)
    rows = rows_of(shape)
    assert rows is not None
    wanted = False
    for operand in operands:
        if not isinstance(operand, fx.Node) or not is_tensor(operand):
            continue
        own = lower.shape(operand)
        if own == shape:
            elements = lower.elements(operand)
            wanted = wanted or (elements.has(rows) and not elements.has(shape))
        elif len(own) > 1 or (own and own[0] not in (1, shape[-1])):
            return False
    return wanted


def _in_rows(lower: Lowering, node: fx.Node, operand: Any, dtype: torch.dtype) -> ir.Value:
    if isinstance(operand, fx.Node) and is_tensor(operand) and lower.shape(operand) == lower.shape(node):
        return lower.cast(lower.rows(operand), lower.dtype(operand), dtype)
    return lower.operand(operand, dtype)
