"""Views around attention that its kernel does itself: heads taken out of linears' outputs and joined again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from graphwright.backends.cpu.kernels.heads import Place
from graphwright.ir.arguments import arguments_of
from graphwright.ir.names import op_name
from graphwright.ir.program import Program
from graphwright.ir.types import TensorType

_RESHAPES = ("aten.reshape", "aten.view")
VIEWS = frozenset({*_RESHAPES, "aten.transpose.int", "aten.split_with_sizes", "py.getitem"})


@dataclass(frozen=True)
class HeadsView:
    """What an attention reads and gives without the views around it.

    Attributes:
        sources: of query, key and value.
        places: of the heads in them; ``None`` for a source that is the operand itself.
        after: the transpose and reshape that join the result, or nothing.
    """

    sources: tuple[fx.Node, ...]
    places: tuple[Place | None, ...]
    after: tuple[fx.Node, ...]


def heads_around(program: Program, attention: fx.Node) -> HeadsView | None:
    """The views around a float32 attention, or ``None`` where there are none."""
    operands = [attention.args[index] for index in range(3)]
    nodes = [node for node in operands if isinstance(node, fx.Node)]
    kinds = [program.type_of(node) for node in nodes]
    if any(not isinstance(kind, TensorType) or kind.dtype != torch.float32 for kind in kinds):
        return None
    found = [_source(program, node) for node in nodes]
    after = _joined(program, attention)
    if not after and all(place is None for _, place in found):
        return None
    return HeadsView(tuple(source for source, _ in found), tuple(place for _, place in found), after)


def _source(program: Program, node: fx.Node) -> tuple[fx.Node, Place | None]:
    """``transpose(reshape(x, [B, S, H, D]), 1, 2)``, and ``x`` may be a part of a split along the features."""
    split = _swapped(node)
    if split is None or op_name(split) not in _RESHAPES:
        return node, None
    x, shape = split.args[0], _shape(program, split)
    if not isinstance(x, fx.Node) or len(shape) != 4:
        return node, None
    before, heads, width = _shape(program, x), shape[2], shape[3]
    if not isinstance(heads, int) or not isinstance(width, int) or before != (*shape[:2], heads * width):
        return node, None
    if op_name(x) != "py.getitem" or not isinstance(x.args[0], fx.Node):
        return x, (0, heads, width)
    parts, index = x.args[0], x.args[1]
    if op_name(parts) != "aten.split_with_sizes" or not isinstance(index, int):
        return x, (0, heads, width)
    given = arguments_of(parts)
    sizes, whole = given["split_sizes"], given["self"]
    along_features = given["dim"] in (-1, 2) and all(isinstance(size, int) for size in sizes)
    return (whole, (sum(sizes[:index]), heads, width)) if along_features else (x, (0, heads, width))


def _joined(program: Program, attention: fx.Node) -> tuple[fx.Node, ...]:
    """``reshape(transpose(y, 1, 2), [B, S, H · D])``, where nothing else reads either."""
    if len(attention.users) != 1:
        return ()
    (swap,) = attention.users
    if _swapped(swap) is not attention or len(swap.users) != 1:
        return ()
    (join,) = swap.users
    shape = _shape(program, swap)
    if op_name(join) not in _RESHAPES or not all(isinstance(size, int) for size in shape[2:]):
        return ()
    joined = (*shape[:2], int(shape[2]) * int(shape[3]))
    return (swap, join) if _shape(program, join) == joined else ()


def _swapped(node: fx.Node) -> fx.Node | None:
    """What a node swaps the middle axes of, when it does that to a tensor of four axes."""
    if node.op != "call_function" or op_name(node) != "aten.transpose.int" or not isinstance(node.args[0], fx.Node):
        return None
    axes = {axis % 4 for axis in node.args[1:] if isinstance(axis, int)}
    value = node.args[0].meta.get("val")
    return node.args[0] if axes == {1, 2} and value is not None and value.dim() == 4 else None


def _shape(program: Program, node: fx.Node) -> tuple[int | str, ...]:
    kind = program.type_of(node)
    return kind.shape if isinstance(kind, TensorType) else ()
