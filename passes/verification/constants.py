"""Values that no input influences, as the program itself computes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import fx

from graphwright.ir.program import Snapshot


def native_constant(
    before: Snapshot, node: fx.Node, given: Mapping[str, torch.Tensor] | None = None
) -> torch.Tensor | None:
    """The value of a node in the program's own dtypes, or ``None`` when an input influences it.

    A pass that stores such a value ahead of time stores exactly this, the rounding of its dtype included; beside the
    float64 value it would look wrong.

    Args:
        before: the program's state.
        node: of that state.
        given: values of some nodes by name, which count as constants.
    """
    given = given or {}
    cone: dict[fx.Node, None] = {}
    stack = [node]
    while stack:
        current = stack.pop()
        if current.op == "placeholder" and current.name not in given:
            return None
        if current not in cone:
            cone[current] = None
            stack.extend(() if current.name in given else current.all_input_nodes)
    values: dict[fx.Node, Any] = {}
    for current in node.graph.nodes:
        if current not in cone:
            continue
        if current.name in given:
            values[current] = given[current.name]
        elif current.op == "get_attr":
            values[current] = before.tensors[str(current.target)]
        else:
            args, kwargs = fx.node.map_arg((current.args, current.kwargs), values.__getitem__)
            values[current] = cast(Callable[..., Any], current.target)(*args, **kwargs)
    value = values[node]
    return value if isinstance(value, torch.Tensor) else None
