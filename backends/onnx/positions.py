"""What a decoding step computes from positions alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphwright.ir.names import op_name
from graphwright.ir.program import Program

_SIZE = "aten.sym_size.int"
# Functions of the same angle may differ by their last bit, with the length they are computed for.
_SAME = 1e-6


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
                reads_content = each is node or any(user in needed and op_name(user) != _SIZE for user in each.users)
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
