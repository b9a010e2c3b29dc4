"""What fusions of spelled-out expressions share: casts, constants, and what must not be looked through."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphwright.ir.arguments import argument
from graphwright.ir.names import op_name
from graphwright.ir.pattern import Match
from graphwright.ir.program import Program
from graphwright.ir.provenance import describe
from graphwright.ir.rewriter import Rewriter
from graphwright.ir.types import DTYPE_NAMES, TensorType

# Operators that give their first operand in another dtype, or as it is.
CASTS: tuple[str, ...] = (
    "aten.to.dtype",
    "aten.to.device",
    "aten.to.dtype_layout",
    "aten.to.other",
    "aten._to_copy",
    "aten.type_as",
)

# Traces assert the dtype of every value they cast; such a use of a value is no use.
ASSERTIONS: tuple[str, ...] = ("aten._assert_tensor_metadata",)

# Mantissa bits (the implicit one included) and exponent bits.
_FLOATS: dict[torch.dtype, tuple[int, int]] = {
    torch.bfloat16: (8, 8),
    torch.float16: (11, 5),
    torch.float32: (24, 8),
    torch.float64: (53, 11),
}


def tensor_type(program: Program, value: Any) -> TensorType | None:
    """The type of a node whose value is one tensor, ``None`` for anything else."""
    kind = program.type_of(value) if isinstance(value, fx.Node) else None
    return kind if isinstance(kind, TensorType) else None


def dtype_of(program: Program, value: Any) -> torch.dtype | None:
    """The dtype of a node, ``None`` for anything but one tensor."""
    kind = tensor_type(program, value)
    return kind.dtype if kind is not None else None


def dtype_name(dtype: torch.dtype | None) -> str:
    """How a dtype is written in the text form."""
    return DTYPE_NAMES.get(dtype, str(dtype)) if dtype is not None else "no tensor"


def widens(narrow: torch.dtype, wide: torch.dtype) -> bool:
    """Whether every value of one floating dtype is a value of the other."""
    if narrow not in _FLOATS or wide not in _FLOATS:
        return False
    return all(low <= high for low, high in zip(_FLOATS[narrow], _FLOATS[wide], strict=True))


def cast_source(program: Program, node: fx.Node) -> fx.Node | None:
    """The node that a cast takes to a dtype at least as wide; ``None`` if the node is no such cast."""
    if op_name(node) not in CASTS:
        return None
    source = argument(node, "self")
    before, after = dtype_of(program, source), dtype_of(program, node)
    if not isinstance(source, fx.Node) or before is None or after is None or not widens(before, after):
        return None
    return source


def without_casts(program: Program, node: fx.Node) -> fx.Node:
    """The node behind any number of widening or idle casts."""
    source = cast_source(program, node)
    while source is not None:
        node, source = source, cast_source(program, source)
    return node


def as_dtype(program: Program, node: fx.Node, dtype: torch.dtype) -> fx.Node | None:
    """The node, or the first one it is a widening cast of, that has this dtype."""
    current: fx.Node | None = node
    found = None
    while current is not None:
        found = current if dtype_of(program, current) == dtype else found
        current = cast_source(program, current)
    return found


def leak(match: Match) -> str | None:
    """Why the inner values of a match cannot be dropped: something outside uses one."""
    inside = set(match.inner)
    for node in match.inner:
        if node is match.root:
            continue
        for user in node.users:
            if user not in inside and op_name(user) not in ASSERTIONS:
                return f"%{node.name}, which would no longer be computed, is also used by {describe(user)}"
    return None


def drop_assertions(rewriter: Rewriter, match: Match) -> None:
    """Remove the assertions on values that are about to go."""
    for node in match.inner:
        for user in list(node.users):
            if node is not match.root and op_name(user) in ASSERTIONS:
                rewriter.erase(user)


def only_used_by(node: fx.Node, user: fx.Node) -> bool:
    """Whether nothing else uses a value; assertions do not count."""
    return all(other is user or op_name(other) in ASSERTIONS for other in node.users)


def trailing_sizes(program: Program, node: fx.Node, dims: Any) -> tuple[int, ...] | str:
    """The sizes of the dimensions a reduction runs over, if they are the last ones and fixed; otherwise why not."""
    kind = tensor_type(program, node)
    if kind is None:
        return f"%{node.name} is not a tensor"
    rank = len(kind.shape)
    wanted = [dims] if isinstance(dims, int) else list(dims or range(rank))
    if any(not isinstance(dim, int) for dim in wanted):
        return "the axes are not constants"
    axes = sorted(dim % rank for dim in wanted)
    if axes != list(range(rank - len(axes), rank)):
        plural = "axis" if len(axes) == 1 else "axes"
        return f"it reduces over {plural} {', '.join(map(str, axes))} of {kind}, not over the last"
    sizes = kind.shape[rank - len(axes) :]
    fixed = tuple(size for size in sizes if isinstance(size, int))
    if len(fixed) != len(sizes):
        return f"the reduced size varies: {kind}"
    return fixed


def vector_reason(
    match: Match, norm: TensorType | None, vector: TensorType | None, shape: tuple[int | str, ...]
) -> str | None:
    """Why the factor or summand of a norm cannot be its weight or bias."""
    if norm is None or vector is None or vector.shape != shape or not all(isinstance(size, int) for size in shape):
        return f"{vector or 'the operand'} does not have the normalised shape {list(shape)}"
    result = tensor_type(match.program, match.root)
    if result != norm:
        return f"the result is {result}, the norm {norm}"
    return None
