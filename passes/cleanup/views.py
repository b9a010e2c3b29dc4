"""Slices, reshapes and permutations that change nothing, cancel, or follow on each other."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphwright.ir.arguments import arguments_of
from graphwright.ir.names import op_name
from graphwright.ir.pattern import Match, Rule
from graphwright.ir.program import Program
from graphwright.ir.rewriter import Rewriter
from graphwright.ir.types import VAL, ScalarType, TensorType

# Operators that keep the elements and their order; equal shapes make them identities.
_RESHAPES = frozenset(
    {
        "aten.view",
        "aten.reshape",
        "aten._unsafe_view",
        "aten.flatten.using_ints",
        "aten.unflatten.int",
        "aten.view_as",
        "aten.reshape_as",
        "aten.expand",
        "aten.expand_as",
        "aten.broadcast_to",
    }
)
# Those that, followed by a reshape, are swallowed by it.
_SWALLOWED = frozenset(
    {
        "aten.view",
        "aten.reshape",
        "aten._unsafe_view",
        "aten.flatten.using_ints",
        "aten.unflatten.int",
        "aten.unsqueeze",
    }
)


def _shape(program: Program, node: Any) -> tuple[int | str, ...] | None:
    kind = program.type_of(node) if isinstance(node, fx.Node) else None
    return kind.shape if isinstance(kind, TensorType) else None


def slice_identity(program: Program, node: fx.Node) -> fx.Node | str | None:
    """The operand of a slice that takes everything."""
    if op_name(node) != "aten.slice.Tensor":
        return None
    arguments = arguments_of(node)
    source, shape = arguments["self"], _shape(program, arguments["self"])
    if not isinstance(source, fx.Node) or shape is None:
        return None
    size = shape[arguments["dim"]]
    whole = arguments["start"] in (None, 0) and arguments["step"] == 1 and _reaches(program, arguments["end"], size)
    return source if whole else None


def _reaches(program: Program, end: Any, size: int | str) -> bool:
    if end is None:
        return True
    if isinstance(end, fx.Node):
        kind = program.type_of(end)
        return isinstance(kind, ScalarType) and kind.expression == str(size)
    return isinstance(end, int) and (end >= 2**62 or (isinstance(size, int) and end >= size))


def reshape_identity(program: Program, node: fx.Node) -> fx.Node | str | None:
    """The operand of a reshape or expand to the shape it has."""
    if op_name(node) not in _RESHAPES:
        return None
    source = node.args[0]
    if not isinstance(source, fx.Node) or program.type_of(source) != program.type_of(node):
        return None
    return source


def squeeze_identity(program: Program, node: fx.Node) -> fx.Node | str | None:
    """The operand of a squeeze that removes nothing, or of a pair of squeeze and unsqueeze."""
    name = op_name(node)
    source = node.args[0] if name in ("aten.squeeze.dim", "aten.unsqueeze", "aten.select.int") else None
    shape = _shape(program, source)
    if not isinstance(source, fx.Node) or shape is None:
        return None
    inner = source.args[0] if source.args else None
    inner_shape = _shape(program, inner)
    rank = len(shape) + (name == "aten.unsqueeze")
    dim = int(arguments_of(node)["dim"]) % max(rank, 1)
    if name == "aten.squeeze.dim" and shape and shape[dim] != 1:
        varies = isinstance(shape[dim], str)
        return f"the size {shape[dim]} may be 1, and then it does something" if varies else source
    if not isinstance(inner, fx.Node) or inner_shape is None:
        return None
    pair = (op_name(source), name)
    if pair not in (
        ("aten.unsqueeze", "aten.squeeze.dim"),
        ("aten.unsqueeze", "aten.select.int"),
        ("aten.squeeze.dim", "aten.unsqueeze"),
    ):
        return None
    wide = max(len(shape), len(inner_shape))
    same_dim = int(arguments_of(source)["dim"]) % wide == dim
    return inner if same_dim and program.type_of(inner) == program.type_of(node) else None


# -- permutations ----------------------------------------------------------------------------------------------------


def permutation(program: Program, node: Any) -> tuple[int, ...] | None:
    """Where each axis of the result comes from; ``None`` when the node is no permutation of axes."""
    shape = _shape(program, node)
    if shape is None:
        return None
    rank, name, arguments = len(shape), op_name(node), list(arguments_of(node).values())
    order = list(range(rank))
    if name in ("aten.transpose.int", "aten.swapaxes", "aten.swapdims.default", "aten.swapdims"):
        return _swapped(order, int(arguments[1]), int(arguments[2]))
    if name == "aten.permute":
        return tuple(int(axis) % rank for axis in arguments[1])
    if name == "aten.mT" or (name == "aten.t" and rank == 2):
        return _swapped(order, -1, -2)
    if name == "aten.numpy_T":
        return tuple(reversed(order))
    return None


def _swapped(order: list[int], first: int, second: int) -> tuple[int, ...]:
    if order:
        order[first], order[second] = order[second], order[first]
    return tuple(order)


def _is_identity(order: tuple[int, ...]) -> bool:
    return order == tuple(range(len(order)))


def _chain(program: Program, node: fx.Node) -> tuple[fx.Node, fx.Node, tuple[int, ...]] | None:
    """Of two permutations in a row: what they start from, the first of them, and what they come to."""
    outer, middle = permutation(program, node), node.args[0] if node.args else None
    inner = permutation(program, middle) if outer is not None else None
    if outer is None or inner is None or not isinstance(middle, fx.Node):
        return None
    source = middle.args[0]
    assert isinstance(source, fx.Node)
    return source, middle, tuple(inner[axis] for axis in outer)


def permutation_identity(program: Program, node: fx.Node) -> fx.Node | str | None:
    """The operand of a permutation that moves nothing, or of two that cancel."""
    order = permutation(program, node)
    if order is None:
        return None
    source = node.args[0]
    if _is_identity(order):
        return source if isinstance(source, fx.Node) else None
    chain = _chain(program, node)
    return chain[0] if chain is not None and _is_identity(chain[2]) else None


class PermutationChain(Rule):
    """Two permutations into one."""

    name = "remove-no-ops: permutations in a row"

    def match(self, program: Program, node: fx.Node) -> Match | tuple[int, str]:
        chain = _chain(program, node)
        if chain is None or len(chain[1].users) > 1:
            return -1, ""
        match = Match(program, node, {"source": chain[0], "order": chain[2]})
        match.inner = [chain[1], node]
        return match

    def rewrite(self, rewriter: Rewriter, match: Match) -> fx.Node:
        order: tuple[int, ...] = match["order"]
        moved = [axis for axis, origin in enumerate(order) if axis != origin]
        if len(moved) == 2:
            return rewriter.call("aten.transpose.int", match.node("source"), *moved, like=match.root)
        return rewriter.call("aten.permute", match.node("source"), list(order), like=match.root)


# -- reshapes --------------------------------------------------------------------------------------------------------


class ViewAsReshape(Rule):
    """``view`` into ``reshape``: the same elements, whatever the layout."""

    name = "remove-no-ops: view"

    def match(self, program: Program, node: fx.Node) -> Match | tuple[int, str]:
        if op_name(node) not in ("aten.view", "aten._unsafe_view"):
            return -1, ""
        match = Match(program, node)
        match.inner = [node]
        return match

    def rewrite(self, rewriter: Rewriter, match: Match) -> fx.Node:
        return rewriter.call("aten.reshape", *match.root.args, like=match.root)


class ReshapeChain(Rule):
    """A reshape of a reshape: only the last shape counts."""

    name = "remove-no-ops: reshapes in a row"

    def match(self, program: Program, node: fx.Node) -> Match | tuple[int, str]:
        middle = node.args[0] if op_name(node) == "aten.reshape" else None
        if not isinstance(middle, fx.Node) or op_name(middle) not in _SWALLOWED or len(middle.users) > 1:
            return -1, ""
        match = Match(program, node, {"source": middle.args[0]})
        match.inner = [middle, node]
        return match

    def check(self, match: Match) -> str | None:
        # With a -1 among sizes that vary, torch may write the same size as another expression.
        program, sizes = match.program, match.root.args[1]
        values = fx.node.map_arg((match.node("source"), sizes), lambda item: item.meta[VAL])
        with program.symbols.mode, torch.no_grad():
            kind = program.symbols.type_of_value(torch.ops.aten.reshape.default(*values))
        if kind != program.type_of(match.root):
            return f"without the first reshape the sizes cannot be shown to be equal: {kind}"
        return None

    def rewrite(self, rewriter: Rewriter, match: Match) -> fx.Node:
        return rewriter.call("aten.reshape", match.node("source"), match.root.args[1], like=match.root)
