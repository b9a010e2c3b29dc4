"""Parts of the last axis: which features of another value a node holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from graphwright.ir.arguments import argument, arguments_of
from graphwright.ir.names import op_name
from graphwright.ir.program import Program
from graphwright.ir.types import TensorType, TupleType
from graphwright.passes.fusion.heads import given_back
from graphwright.passes.fusion.matching import tensor_type

_SPLITS = ("aten.split.Tensor", "aten.split_with_sizes", "aten.chunk", "aten.unsafe_chunk")


@dataclass(frozen=True)
class Span:
    """Every ``step``-th of the last axis's places from ``start`` on, ``length`` of them."""

    start: int
    length: int
    step: int = 1


def span_of(program: Program, node: Any, base: fx.Node) -> Span | None:
    """Which part of the last axis of ``base`` a node is; ``None`` if it is no such part."""
    if not isinstance(node, fx.Node):
        return None
    width = width_of(program, node)
    if width is None:
        return None
    if node is base or given_back(program, node) is given_back(program, base):
        return Span(0, width)
    cut = _cut(program, node) or _cut(program, given_back(program, node))
    if cut is None:
        return None
    source, start, step = cut
    outer = span_of(program, source, base)
    return None if outer is None else Span(outer.start + start * outer.step, width, step * outer.step)


def _cut(program: Program, node: fx.Node) -> tuple[fx.Node, int, int] | None:
    """What a node takes a part of, from where, and by which step."""
    name, arguments = op_name(node), arguments_of(node)
    if name == "aten.slice.Tensor":
        source, start, step = arguments["self"], arguments["start"] or 0, arguments["step"]
        width = width_of(program, source)
        if width is None or not is_last(program, source, arguments["dim"]):
            return None
        if not isinstance(start, int) or not isinstance(step, int):
            return None
        return source, start if start >= 0 else max(start + width, 0), step
    if name == "aten.narrow":
        source, start = arguments["self"], arguments["start"]
        is_plain = isinstance(start, int) and start >= 0 and is_last(program, source, arguments["dim"])
        return (source, start, 1) if is_plain else None
    if name != "py.getitem":
        return None
    parts, place = node.args
    if not isinstance(parts, fx.Node) or op_name(parts) not in _SPLITS or not isinstance(place, int):
        return None
    source, kinds = parts.args[0], program.type_of(parts)
    if not isinstance(source, fx.Node) or not is_last(program, source, argument(parts, "dim")):
        return None
    assert isinstance(kinds, TupleType)
    sizes = [kind.shape[-1] for kind in kinds.items[:place] if isinstance(kind, TensorType)]
    fixed = [size for size in sizes if isinstance(size, int)]
    return (source, sum(fixed), 1) if len(fixed) == place else None


def is_last(program: Program, node: fx.Node, dim: Any) -> bool:
    kind = tensor_type(program, node)
    return kind is not None and isinstance(dim, int) and dim % len(kind.shape) == len(kind.shape) - 1


def width_of(program: Program, node: Any) -> int | None:
    kind = tensor_type(program, node)
    last = kind.shape[-1] if kind is not None and kind.shape else None
    return last if isinstance(last, int) else None


def joined(program: Program, node: Any) -> list[Any] | None:
    """The two parts that a node puts side by side along the last axis."""
    if not isinstance(node, fx.Node) or op_name(node) != "aten.cat" or len(node.args[0]) != 2:  # type: ignore[arg-type]
        return None
    parts: list[Any] = list(node.args[0])  # type: ignore[arg-type]
    return parts if is_last(program, node, argument(node, "dim")) else None


def bases_of(program: Program, node: fx.Node) -> list[fx.Node]:
    """The values a node may be a part of, nearest first."""
    found: list[fx.Node] = []
    cut = _cut(program, node) or _cut(program, given_back(program, node))
    while cut is not None and len(found) < 4:
        found.append(cut[0])
        bare = given_back(program, cut[0])
        cut = _cut(program, bare)
    return found
