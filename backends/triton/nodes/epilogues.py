"""What follows a linear, by the kernel or by torch, and the low-rank branch beside it as a program has it."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

import torch
from torch import fx

from graphwright.backends.triton.kernels.epilogue import WIDEST_BRANCH
from graphwright.ir.arguments import arguments_of
from graphwright.ir.names import op_name
from graphwright.ir.ops.activation import ACTIVATIONS, activate
from graphwright.ir.program import Program
from graphwright.ir.types import TensorType


@dataclass(frozen=True)
class Branch:
    """``x Aᵀ`` and ``B`` of an adapter whose product is added to a linear: ``y + (scale ·) down upᵀ``.

    Attributes:
        down: gives ``[..., r]``.
        up: gives ``[out, r]``.
        absorbed: the linear of ``up``, where it is scaled afterwards the scaling, and the sum.
        scale: of the product.
    """

    down: fx.Node
    up: fx.Node
    absorbed: tuple[fx.Node, ...]
    scale: float


def branch_of(program: Program, linear: fx.Node, taken: Set[fx.Node]) -> Branch | None:
    """The low-rank branch that is added to a linear, and to nothing else, before anything else is done with it.

    ::

        %up = aten.linear(%down, %B)          or, scaled, %up = aten.mul.Tensor(aten.linear(%down, %B), 2.0)
        %y = aten.add.Tensor(%linear, %up)

    ``None`` where there is none, its rank is above :data:`WIDEST_BRANCH`, or a part of it is used elsewhere, of another
    dtype or ``taken`` by another kernel.
    """
    if len(linear.users) != 1:
        return None
    (total,) = linear.users
    if total.op != "call_function" or op_name(total) != "aten.add.Tensor" or total in taken:
        return None
    given = arguments_of(total)
    others = [given[name] for name in ("self", "other") if given[name] is not linear]
    if len(others) != 1 or not isinstance(others[0], fx.Node) or given["alpha"] != 1:
        return None
    last, absorbed, scale = others[0], [total], 1.0
    if _is_call(last, "aten.mul.Tensor") and isinstance(arguments_of(last)["other"], int | float):
        absorbed.insert(0, last)
        scale = float(arguments_of(last)["other"])
        last = arguments_of(last)["self"]
    if not _is_call(last, "aten.linear") or arguments_of(last)["bias"] is not None:
        return None
    absorbed.insert(0, last)
    down, up = arguments_of(last)["input"], arguments_of(last)["weight"]
    kinds = [program.type_of(each) for each in (linear, total, last, down, up)]
    if any(len(each.users) != 1 or each in taken for each in absorbed[:-1]):
        return None
    if not all(isinstance(kind, TensorType) for kind in kinds) or not kinds[0] == kinds[1] == kinds[2]:
        return None
    rank = up.meta["val"].shape[1]
    if len({down.meta["val"].dtype, up.meta["val"].dtype, linear.meta["val"].dtype}) > 1 or rank > WIDEST_BRANCH:
        return None
    return Branch(down, up, tuple(absorbed), scale)


def _is_call(node: object, name: str) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and op_name(node) == name


def branch_in_torch(y: torch.Tensor, down: torch.Tensor | None, up: torch.Tensor | None, scale: float) -> torch.Tensor:
    """``y + scale · down upᵀ`` with gradients."""
    if down is None or up is None:
        return y
    product = torch.nn.functional.linear(down, up)
    return y + (product if scale == 1 else product * scale)


def epilogue_in_torch(
    y: torch.Tensor, activation: str, factor: torch.Tensor | None, residual: torch.Tensor | None
) -> torch.Tensor:
    """``activation(y) * factor + residual`` with gradients."""
    if activation == "tanh":
        y = torch.tanh(y)
    elif activation in ACTIVATIONS:
        y = activate(y, activation)
    y = y if factor is None else y * factor
    return y if residual is None else y + residual
