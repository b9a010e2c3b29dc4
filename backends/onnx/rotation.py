"""Rotary embedding inside of attention: angles that depend on positions alone, stored as tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from graphwright.backends.onnx.decoder import DecoderLowering
from graphwright.ir.arguments import argument
from graphwright.ir.names import op_name
from graphwright.ir.program import Program
from graphwright.ir.provenance import path_of

_ROTATE = "graphwright.rotary_embedding"
_SIZE = "aten.sym_size.int"
# What the kernel asks of the head dim and of the features it rotates.
_WIDTH_STEP = 16
# Functions of the same angle may differ by their last bit, with the length they are computed for.
_SAME = 1e-6


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

    It can where both are rotated by the same angles, these depend on positions alone, and positions are limited
    (``context_length``). Otherwise the rotation stays an operator by itself.
    """
    positions = lower.options.context_length
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


def position_table(program: Program, node: fx.Node, positions: int) -> torch.Tensor | None:
    """A value ``[B or 1, S, R]`` of a decoding step for positions 0 to ``positions - 1``: ``[positions, R]``.

    ``None`` when it depends on anything but each token's position, which is tried out.
    """
    zero = torch.zeros(1, dtype=torch.int64)
    whole = _evaluate(program, node, zero, positions)
    if whole is None or whole.dim() != 3 or whole.shape[:2] != (1, positions):
        return None
    table = whole[0]
    starts = torch.tensor([0, positions // 3, positions - 2])
    parts = _evaluate(program, node, starts, 2)
    wanted = table[starts.unsqueeze(1) + torch.arange(2)]
    if parts is None or parts.shape != wanted.shape or not torch.allclose(parts, wanted, rtol=0, atol=_SAME):
        return None
    return table


def _evaluate(program: Program, node: fx.Node, starts: torch.Tensor, length: int) -> torch.Tensor | None:
    tokens = torch.zeros(len(starts), length, dtype=torch.int64)
    given = {program.inputs[0]: tokens, program.inputs[2]: starts}
    needed = {node}
    for each in reversed(program.nodes):
        if each in needed:
            needed.update(each.all_input_nodes)
    values: dict[fx.Node, Any] = {}
    with torch.no_grad():
        for each in program.nodes:
            if each not in needed:
                continue
            if each.op == "placeholder":
                reads_content = any(user in needed and op_name(user) != _SIZE for user in each.users)
                if each not in given or (each is program.inputs[0] and reads_content):
                    return None
                values[each] = given[each]
            elif each.op == "get_attr":
                values[each] = program.tensor(each)
            else:
                target: Any = each.target
                args, kwargs = fx.node.map_arg((each.args, dict(each.kwargs)), values.__getitem__)
                values[each] = target(*args, **kwargs)
    result = values[node]
    return result if isinstance(result, torch.Tensor) else None
