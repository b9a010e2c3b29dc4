"""Which linears can be pruned, and why others cannot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import fx

from graphwright.ir.arguments import arguments_of
from graphwright.ir.errors import InputError
from graphwright.ir.names import op_name
from graphwright.ir.program import Program
from graphwright.ir.provenance import path_of
from graphwright.passes.quantization.targets import LinearTarget

HELD = "graphwright.apply_mask"
_PACKED = "graphwright.linear_"


def check_unpacked(name: str, node: fx.Node) -> None:
    """Refuse a linear whose weight is packed already, or whose mask is held.

    Args:
        name: of the pass.
        node: any call.

    Raises:
        InputError: it is one; says what to do.
    """
    given = arguments_of(node)
    if op_name(node).startswith(_PACKED) and isinstance(given.get("qweight"), fx.Node):
        raise InputError(
            f"the weight {str(given['qweight'].target)!r} is packed already, and zeros are chosen before codes",
            where=f"{name} at {path_of(node) or node.name}",
            hint="prune first, then quantise; or leave the linear out with ignore=",
        )
    if op_name(node).startswith("graphwright.linear_sparse"):
        raise InputError(
            "the weight is compressed already",
            where=f"{name} at {path_of(node) or node.name}",
            hint="run DecompressLinears first, and CompressLinears again behind; or leave the linear out with ignore=",
        )
    weight = given.get("weight")
    if isinstance(weight, fx.Node) and op_name(weight) == HELD:
        raise InputError(
            "the weight's mask is held for training",
            where=f"{name} at {path_of(node) or node.name}",
            hint="run ReleaseMasks first, and HoldMasks again behind",
        )


def other_reader(program: Program, targets: Sequence[LinearTarget]) -> Mapping[fx.Node, str]:
    """Linears whose weight is read by something that is none of the targets, and the reason in words."""
    known = {target.node for target in targets}
    readers: dict[str, list[fx.Node]] = {}
    for node in program.nodes:
        if node.op == "get_attr":
            readers.setdefault(str(node.target), []).extend(node.users)
    reasons: dict[fx.Node, str] = {}
    for target in targets:
        others = [user for user in readers[str(target.weight.target)] if user not in known]
        if others:
            reasons[target.node] = f"its weight is also read by %{others[0].name}, which would change too"
    return reasons


def matrix_of(program: Program, target: LinearTarget) -> torch.Tensor:
    """The weight as ``[out, in]``, in its own dtype."""
    weight = program.tensor(target.weight).detach()
    return weight.t() if target.transposed else weight


def stored_as(target: LinearTarget, weight: torch.Tensor) -> torch.Tensor:
    """A weight ``[out, in]`` as the linear stores it."""
    return (weight.t() if target.transposed else weight).contiguous()
