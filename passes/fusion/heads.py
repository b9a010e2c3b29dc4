"""Queries, keys and values as an attention operator wants them: behind scalings, transpositions and repeated heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx, nn

from graphwright.ir.arguments import argument, arguments_of
from graphwright.ir.names import op_name
from graphwright.ir.program import Program
from graphwright.ir.rewriter import Rewriter
from graphwright.ir.types import TensorType, fake_of
from graphwright.passes.cleanup.casts import cast_identity
from graphwright.passes.cleanup.effects import is_idle_dropout
from graphwright.passes.cleanup.views import permutation, reshape_identity, slice_identity
from graphwright.passes.fusion.layout import shared_call
from graphwright.passes.fusion.matching import as_dtype, tensor_type

_COPIES = frozenset({"aten.clone", "aten.contiguous", "aten.alias"})
_RESHAPES = frozenset({"aten.view", "aten.reshape", "aten._unsafe_view", "aten.flatten.using_ints"})


def given_back(program: Program, node: fx.Node) -> fx.Node:
    """The value behind operators that give it back: idle casts and dropouts, full slices, copies, equal reshapes."""
    while True:
        found: fx.Node | str | None = None
        if op_name(node) in _COPIES or is_idle_dropout(node):
            found = node.args[0]  # type: ignore[assignment]
        else:
            for find in (cast_identity, slice_identity, reshape_identity):
                found = found or find(program, node)
        if not isinstance(found, fx.Node) or program.type_of(found) != program.type_of(node):
            return node
        node = found


def constant_of(program: Program, value: Any) -> float | None:
    """A number, or the value of a constant tensor of one element; ``None`` for what is computed or trained."""
    if isinstance(value, int | float):
        return float(value)
    if not isinstance(value, fx.Node):
        return None
    if op_name(value) in ("aten.full", "aten.scalar_tensor"):
        number = value.args[0] if op_name(value) == "aten.scalar_tensor" else value.args[1]
        is_one = set(_shape(program, value)) <= {1}
        return float(number) if isinstance(number, int | float) and is_one else None
    if value.op != "get_attr":
        return None
    tensor = program.tensor(value)
    return float(tensor) if tensor.numel() == 1 and not isinstance(tensor, nn.Parameter) else None


def scaled(program: Program, node: fx.Node) -> tuple[fx.Node, float] | None:
    """What a node multiplies or divides by a constant, and the factor."""
    name = op_name(node)
    if name not in ("aten.mul.Tensor", "aten.div.Tensor", "aten.mul.Scalar", "aten.div.Scalar"):
        return None
    left, right = node.args[0], node.args[1]
    pairs = [(left, right), (right, left)] if name.startswith("aten.mul") else [(left, right)]
    for source, other in pairs:
        factor = constant_of(program, other)
        if factor is None or not isinstance(source, fx.Node) or program.type_of(source) != program.type_of(node):
            continue
        if name.startswith("aten.div"):
            return (source, 1.0 / factor) if factor else None
        return source, factor
    return None


@dataclass(frozen=True)
class Heads:
    """A query, key or value: a node, and the permutation of its axes that gives ``[B, H, length, width]``."""

    node: fx.Node
    order: tuple[int, ...] | None = None
    factor: float = 1.0

    def shape(self) -> tuple[Any, ...]:
        """Sizes after the permutation."""
        sizes = fake_of(self.node).shape
        return tuple(sizes) if self.order is None else tuple(sizes[axis] for axis in self.order)

    def make(self, rewriter: Rewriter, like: fx.Node) -> fx.Node:
        """The node, permuted and with an axis of one head where there is none."""
        node = self.node
        if self.order is not None and self.order != tuple(range(len(self.order))):
            moved = [axis for axis, origin in enumerate(self.order) if axis != origin]
            if len(moved) == 2:
                node = shared_call(rewriter, "aten.transpose.int", node, *moved, like=like)
            else:
                node = shared_call(rewriter, "aten.permute", node, list(self.order), like=like)
        return node if fake_of(node).dim() == 4 else shared_call(rewriter, "aten.unsqueeze", node, 1, like=like)


def bare(program: Program, heads: Heads) -> Heads:
    """The same without operators that give back what they are given."""
    return replace(heads, node=given_back(program, heads.node))


def unscaled(program: Program, heads: Heads) -> Heads:
    """The same without multiplications by constants, which go into ``factor``."""
    while True:
        behind = given_back(program, heads.node)
        found = scaled(program, behind)
        if found is None:
            return heads
        heads = replace(heads, node=found[0], factor=heads.factor * found[1])


def transposed(program: Program, node: fx.Node) -> Heads:
    """A node with its last two axes swapped, as the permutation of what it is itself a permutation of."""
    rank = fake_of(node).dim()
    order = permutation(program, node)
    source = node.args[0] if order is not None else node
    assert isinstance(source, fx.Node)
    axes = list(order if order is not None else range(rank))
    axes[-1], axes[-2] = axes[-2], axes[-1]
    return Heads(source, None if axes == list(range(rank)) else tuple(axes))


def unfolded(program: Program, heads: Heads) -> Heads | None:
    """From ``[B * H, length, width]`` back to the ``[B, H, length, width]`` it was reshaped from."""
    if heads.order not in (None, (0, 2, 1)):
        return None
    node = given_back(program, heads.node)
    if op_name(node) not in _RESHAPES or fake_of(node).dim() != 3:
        return None
    source = node.args[0]
    before, after = tensor_type(program, source), tensor_type(program, node)
    if not isinstance(source, fx.Node) or before is None or after is None or len(before.shape) != 4:
        return None
    if before.shape[2:] != after.shape[1:] or not isinstance(before.shape[1], int):
        return None
    return replace(heads, node=source, order=None if heads.order is None else (0, 1, 3, 2))


def unrepeated(program: Program, heads: Heads) -> tuple[Heads, int]:
    """A key or value without the repetition of its heads for grouped queries, and how often each was repeated."""
    node = given_back(program, heads.node)
    order = list(heads.order or range(fake_of(node).dim()))
    moved = permutation(program, node)
    if moved is not None:
        order = [moved[axis] for axis in order]
        inner = node.args[0]
        assert isinstance(inner, fx.Node)
        node = given_back(program, inner)
    if len(order) != 4:
        return heads, 1
    found = _repetition(program, node, order[1])
    if found is None:
        return heads, 1
    source, count = found
    return replace(heads, node=source, order=None if order == [0, 1, 2, 3] else tuple(order)), count


def _repetition(program: Program, node: fx.Node, axis: int) -> tuple[fx.Node, int] | None:
    """What a node repeats along an axis, each slice ``count`` times in a row."""
    shape = _shape(program, node)
    if op_name(node) == "aten.repeat_interleave.self_int":
        arguments = arguments_of(node)
        source, count, dim = arguments["self"], arguments["repeats"], arguments["dim"]
        if isinstance(count, int) and dim is not None and dim % len(shape) == axis:
            return source, count
        return None
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or not isinstance(shape[axis], int):
        return None
    if op_name(node) in ("aten.expand", "aten.expand_as") and _shape(program, source) == _with(shape, axis, 1):
        return source, shape[axis]
    expanded = given_back(program, source)
    if op_name(node) not in _RESHAPES or op_name(expanded) not in ("aten.expand", "aten.broadcast_to"):
        return None
    wide = _shape(program, expanded)
    count = wide[axis + 1] if len(wide) == 5 else None
    if not isinstance(count, int) or not isinstance(wide[axis], int):
        return None
    if (*wide[:axis], wide[axis] * count, *wide[axis + 2 :]) != shape:
        return None
    return _singled(program, expanded.args[0], (*wide[: axis + 1], *wide[axis + 2 :]), axis + 1, count)


def _singled(program: Program, node: Any, shape: Sequence[Any], axis: int, count: int) -> tuple[fx.Node, int] | None:
    """What a node adds an axis of size 1 to, by an unsqueeze or a reshape."""
    node = given_back(program, node)
    if op_name(node) not in ("aten.unsqueeze", *_RESHAPES) or _shape(program, node) != (
        *shape[:axis],
        1,
        *shape[axis:],
    ):
        return None
    source = node.args[0]
    if not isinstance(source, fx.Node) or _shape(program, source) != tuple(shape):
        return None
    if op_name(node) == "aten.unsqueeze" and argument(node, "dim") % 5 != axis:
        return None
    return source, count


def _shape(program: Program, node: fx.Node) -> tuple[Any, ...]:
    kind = program.type_of(node)
    return kind.shape if isinstance(kind, TensorType) else ()


def _with(shape: Sequence[Any], axis: int, size: int) -> tuple[Any, ...]:
    return (*shape[:axis], size, *shape[axis + 1 :])


def in_dtype(program: Program, heads: Heads, like: fx.Node) -> Heads | None:
    """The same in the dtype of another node, looking behind casts that lost nothing; ``None`` if it is in no such."""
    node = as_dtype(program, heads.node, fake_of(like).dtype)
    return None if node is None else replace(heads, node=node)
