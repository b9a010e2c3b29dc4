"""The two products of an attention, written as ``matmul``, ``bmm`` or ``einsum``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from graphwright.ir.names import op_name
from graphwright.ir.program import Program
from graphwright.ir.types import fake_of
from graphwright.passes.fusion.heads import Heads, given_back, transposed, unscaled

MATRIX_PRODUCTS = frozenset({"aten.matmul", "aten.bmm"})


@dataclass(frozen=True)
class WeightedSum:
    """Attention weights times values.

    Attributes:
        weights: ``[B, H, S, T]`` or ``[B, S, T]``.
        value: the values.
        order: permutation of the ``[B, H, S, D]`` result that the node gives, ``None`` for none.
    """

    weights: fx.Node
    value: Heads
    order: tuple[int, ...] | None = None


def query_and_key(program: Program, node: fx.Node) -> tuple[Heads, Heads] | None:
    """The factors of scores ``Q Kᵀ``."""
    if op_name(node) in MATRIX_PRODUCTS:
        query, key = node.args[:2]
        if not isinstance(query, fx.Node) or not isinstance(key, fx.Node):
            return None
        return Heads(query), transposed_key(program, key)
    parsed = _einsum(node)
    if parsed is None:
        return None
    (query, key), (left, right, out) = parsed
    rows, columns = out[-2], out[-1]
    batch = out[:-2]
    width = "".join(set(left) & set(right) - set(out))
    if len(width) != 1 or set(left) != {*batch, rows, width} or set(right) != {*batch, columns, width}:
        return None
    return _ordered(query, left, batch + rows + width), _ordered(key, right, batch + columns + width)


def transposed_key(program: Program, node: fx.Node) -> Heads:
    """The key behind the second factor of the scores, with whatever scales it."""
    outer = unscaled(program, Heads(node))
    inner = transposed(program, given_back(program, outer.node))
    return replace(inner, factor=inner.factor * outer.factor)


def weighted_sum(node: fx.Node) -> WeightedSum | None:
    """The factors of a product of weights with values."""
    if op_name(node) in MATRIX_PRODUCTS:
        weights, value = node.args[:2]
        is_product = isinstance(weights, fx.Node) and isinstance(value, fx.Node)
        return WeightedSum(weights, Heads(value)) if is_product else None  # type: ignore[arg-type]
    parsed = _einsum(node)
    if parsed is None:
        return None
    (weights, value), (left, right, out) = parsed
    batch, rows, keys = left[:-2], left[-2], left[-1]
    width = "".join(set(right) - {*batch, keys})
    if len(width) != 1 or set(right) != {*batch, keys, width} or set(out) != {*batch, rows, width}:
        return None
    plain = batch + rows + width
    order = tuple(plain.index(label) for label in out)
    return WeightedSum(weights, _ordered(value, right, batch + keys + width), None if out == plain else order)


def _ordered(node: fx.Node, labels: str, wanted: str) -> Heads:
    order = tuple(labels.index(label) for label in wanted)
    return Heads(node, None if labels == wanted else order)


def _einsum(node: fx.Node) -> tuple[tuple[fx.Node, fx.Node], tuple[str, str, str]] | None:
    """Operands and labels of an einsum of two tensors of the same 3 or 4 axes, each label once per operand."""
    if op_name(node) != "aten.einsum":
        return None
    equation: Any = node.args[0]
    operands: Sequence[Any] = node.args[1]  # type: ignore[assignment]
    inputs, arrow, out = equation.replace(" ", "").partition("->")
    labels = inputs.split(",")
    if not arrow or len(labels) != 2 or len(operands) != 2 or "." in equation:
        return None
    if not all(isinstance(item, fx.Node) for item in operands):
        return None
    spelled = (labels[0], labels[1], out)
    if any(len(set(item)) != len(item) for item in spelled) or {len(item) for item in spelled} not in ({3}, {4}):
        return None
    if any(fake_of(item).dim() != len(label) for item, label in zip(operands, labels, strict=True)):
        return None
    return (operands[0], operands[1]), spelled
