"""Linears as removal sees them, and the feed-forward blocks that they make."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphwright.ir.arguments import arguments_of
from graphwright.ir.names import op_name
from graphwright.passes.removal.operators import SPLITS, VIEWS, is_elementwise

_ACTIVATIONS = frozenset(
    f"aten.{name}"
    for name in (
        *("elu", "erf", "gelu", "hardsigmoid", "hardswish", "leaky_relu", "mish", "relu", "sigmoid", "silu"),
        *("softplus", "tanh"),
    )
) | {"graphwright.gated_activation"}
_MOVES = VIEWS | SPLITS | {"py.getitem", "aten.slice.Tensor", "graphwright.fake_quantize"}
_FARTHEST = 32


@dataclass(frozen=True)
class Linear:
    """A product with a weight.

    Attributes:
        node: the operator.
        x: what it reads, ``[..., in]``.
        weight: the ``get_attr`` node of the weight, also where a mask or something else of its shape stands between.
        transposed: the weight is stored ``[in, out]``.
    """

    node: fx.Node
    x: fx.Node
    weight: fx.Node
    transposed: bool


def linear_at(node: fx.Node) -> Linear | None:
    """The linear at a node, in any spelling and any floating dtype."""
    given: dict[str, Any] = arguments_of(node) if node.op == "call_function" else {}
    name = op_name(node)
    if name == "aten.linear":
        x, weight = given["input"], given["weight"]
    elif name == "aten.addmm":
        x, weight = given["mat1"], given["mat2"]
    elif name in ("aten.mm", "aten.matmul"):
        x, weight = given["self"], given.get("mat2", given.get("other"))
    else:
        return None
    shape = weight.meta["val"].shape
    while weight.op == "call_function" and weight.args and isinstance(weight.args[0], fx.Node):
        weight = weight.args[0]
    held = weight.op == "get_attr" and len(shape) == 2 and weight.meta["val"].shape == shape
    return Linear(node, x, weight, name != "aten.linear") if held else None


def feed_forward_at(last: fx.Node) -> Linear | None:
    """The last linear of a feed-forward block at a node: an activation leads back to linears of one value.

    The block gives as many features as it takes, as one with a residual sum does; so a pooler with its classifier is
    none.
    """
    found = linear_at(last)
    if found is None:
        return None
    inputs: set[fx.Node] = set()
    active, seen, stack = False, set[fx.Node](), [found.x]
    while stack:
        node = stack.pop()
        if node in seen or node.op == "get_attr":
            continue
        seen.add(node)
        first = linear_at(node)
        name = op_name(node)
        if first is not None:
            inputs.add(first.x)
        elif len(seen) < _FARTHEST and (name in _ACTIVATIONS or name in _MOVES or is_elementwise(name)):
            active = active or name in _ACTIVATIONS
            # Sizes of a view are computed elsewhere.
            stack += [each for each in node.all_input_nodes if not isinstance(each.meta["val"], torch.SymInt)]
        else:
            return None
    if not active or len(inputs) != 1:
        return None
    into, out = next(iter(inputs)).meta["val"].shape[-1], last.meta["val"].shape[-1]
    return found if into == out else None
