"""Rotary embedding inside of attention: angles that depend on positions alone, stored as tables."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch import fx

from graphwright.backends.onnx.decoder import DecoderLowering
from graphwright.backends.onnx.positions import position_table
from graphwright.ir.arguments import argument
from graphwright.ir.names import op_name
from graphwright.ir.provenance import path_of

_ROTATE = "graphwright.rotary_embedding"
# What the kernel asks of the head dim and of the features it rotates.
_WIDTH_STEP = 16


@dataclass(frozen=True)
class Rotation:
    """Queries and keys before they are rotated, and by what.

    Attributes:
        query: ``[B, H, S, D]``.
        key: ``[B, Hkv, S, D]``.
        cos: table ``[positions, R / 2]``.
        sin: the same.
        interleaved: whether pairs are neighbours.
    """

    query: fx.Node
    key: fx.Node
    cos: ir.Value
    sin: ir.Value
    interleaved: bool


def find_rotation(lower: DecoderLowering, query: fx.Node, key: fx.Node) -> Rotation | None:
    """How queries and keys are rotated, if ``GroupQueryAttention`` can do it.

    It can where both are rotated by the same angles, these depend on positions alone, and positions are limited.
    Otherwise the rotation stays an operator by itself.
    """
    positions = lower.positions
    if positions is None or op_name(query) != _ROTATE or op_name(key) != _ROTATE:
        return None
    cos, sin, interleaved = (argument(query, each) for each in ("cos", "sin", "interleaved"))
    if [argument(key, each) for each in ("cos", "sin", "interleaved")] != [cos, sin, interleaved]:
        return None
    width, rotated = lower.shape(query)[3], lower.shape(cos)[2]
    if not isinstance(rotated, int) or width % _WIDTH_STEP or rotated % _WIDTH_STEP:
        return None
    tables = lower.once(("angles", cos, sin, interleaved), lambda: _tables(lower, cos, sin, interleaved, positions))
    if tables is None:
        return None
    return Rotation(argument(query, "x"), argument(key, "x"), tables[0], tables[1], interleaved)


def _tables(
    lower: DecoderLowering, cos: fx.Node, sin: fx.Node, interleaved: bool, positions: int
) -> tuple[ir.Value, ir.Value] | None:
    found: list[ir.Value] = []
    for name, node in (("cos", cos), ("sin", sin)):
        table = position_table(lower.program, node, positions)
        if table is None:
            return None
        half = table.shape[1] // 2
        one, other = (table[:, 0::2], table[:, 1::2]) if interleaved else (table[:, :half], table[:, half:])
        if not torch.equal(one, other):
            return None
        stem = ".".join(part for part in (path_of(node), f"{name}_table") if part)
        found.append(lower.graph.weight(lower.graph.unique(stem), one.to(lower.dtype(node)).contiguous()))
    return found[0], found[1]
