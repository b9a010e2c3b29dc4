"""The varying sizes of an exported model: names, limits, input types, and the conditions of the traced path."""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Mapping, Sequence

import torch
from torch import fx
from torch.utils._sympy.numbers import int_oo

from graphwright.frontends.torch.dynamic import Roles
from graphwright.frontends.torch.examples import Leaf
from graphwright.ir.conditions import holds, is_bound, names_in
from graphwright.ir.errors import ProgramError, TraceError
from graphwright.ir.types import Dim, TensorType

# Torch takes every open size for at least 2, never tracing 0 and 1 openly; that bound is its own, not the model's.
_TORCH_LEAST = 2
# Sizes at which a condition must hold to be taken for one that always does; values around its own constants are added.
_PROBES = (1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 31, 33, 64, 100, 511, 512, 513, 1000, 4096, 32771)


def tensor_placeholders(exported: torch.export.ExportedProgram) -> list[fx.Node]:
    """The placeholders of the user's inputs, one per leaf."""
    names = set(exported.graph_signature.user_inputs)
    placeholders = [node for node in exported.graph.nodes if node.op == "placeholder"]
    lifted = len(placeholders) - len(exported.graph_signature.user_inputs)
    assert all(node.name in names for node in placeholders[lifted:] if isinstance(node.meta.get("val"), torch.Tensor))
    return placeholders[lifted:]


def _symbol(size: object) -> str | None:
    if not isinstance(size, torch.SymInt):
        return None
    expression = size.node.expr
    return str(expression) if expression.is_symbol else None


def fixed_names(exported: torch.export.ExportedProgram, leaves: Sequence[Leaf], roles: Roles) -> set[str]:
    """Names of dimensions that were to stay open and that the model fixed, in one input at least."""
    fixed: set[str] = set()
    for leaf, node in zip(leaves, tensor_placeholders(exported), strict=True):
        for axis, name in roles.get(leaf.index, {}).items():
            if _symbol(node.meta["val"].shape[axis]) is None:
                fixed.add(name)
    return fixed


def dimensions(
    exported: torch.export.ExportedProgram, leaves: Sequence[Leaf], roles: Roles
) -> tuple[dict[str, Dim], dict[int, TensorType]]:
    """The dimensions that stayed open, and the type of every tensor input by leaf index.

    Two sizes of one name are one dimension, also where the model itself would take different ones.
    """
    dims: dict[str, Dim] = {}
    types: dict[int, TensorType] = {}
    by_symbol: dict[str, str] = {}
    for leaf, node in zip(leaves, tensor_placeholders(exported), strict=True):
        if not isinstance(leaf.value, torch.Tensor):
            continue
        shape: list[int | str] = []
        for axis, size in enumerate(node.meta["val"].shape):
            present = int(leaf.value.shape[axis])
            symbol = _symbol(size)
            if symbol is None:
                shape.append(present)
                continue
            wanted = roles.get(leaf.index, {}).get(axis, f"{leaf.name.replace('.', '_')}_{axis}")
            name = by_symbol.setdefault(symbol, wanted)
            low, high = _limits(exported, size)
            seen = dims.get(name, Dim(name, low, high, present))
            highs = [limit for limit in (seen.max, high) if limit is not None]
            dims[name] = Dim(name, max(seen.min, low), min(highs) if highs else None, seen.hint)
            shape.append(name)
        types[leaf.index] = TensorType(leaf.value.dtype, tuple(shape))
    return dims, types


def _limits(exported: torch.export.ExportedProgram, size: torch.SymInt) -> tuple[int, int | None]:
    limits = exported.range_constraints.get(size.node.expr)
    if limits is None:
        return 1, None
    low = int(limits.lower) if int(limits.lower) > _TORCH_LEAST else 1
    high = None if limits.upper >= int_oo or int(limits.upper) >= 2**31 else int(limits.upper)
    return low, high


def conditions(
    exported: torch.export.ExportedProgram, leaves: Sequence[Leaf], types: Mapping[int, TensorType]
) -> tuple[str, ...]:
    """What sizes must satisfy, beyond the limits of each, for the traced path to be the one the model would take.

    Raises:
        TraceError: the model decides by something that cannot be said of sizes.
    """
    shapes = {leaf.source: types[leaf.index].shape for leaf in leaves if leaf.index in types}
    constants = [leaf.source for leaf in leaves if leaf.index not in types]
    found: dict[str, None] = {}
    for guard in getattr(exported, "_guards_code", None) or ():
        if any(source in guard for source in constants) and ".size()" not in guard:
            continue  # a constant argument, which the signature holds
        condition = _translate(guard, shapes)
        if not is_bound(condition) and not _seems_always_true(condition):
            found[condition] = None
    return tuple(found)


class _Sizes(ast.NodeTransformer):
    """Writes ``L['x'].size()[0]`` as the name or number of that size."""

    def __init__(self, shapes: Mapping[str, tuple[int | str, ...]]) -> None:
        self.shapes = shapes

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        call = node.value
        if (
            isinstance(call, ast.Call)
            and isinstance(call.func, ast.Attribute)
            and call.func.attr == "size"
            and isinstance(node.slice, ast.Constant)
        ):
            shape = self.shapes.get(ast.unparse(call.func.value))
            if shape is not None:
                size = shape[int(str(node.slice.value))]
                return ast.Name(size, ast.Load()) if isinstance(size, str) else ast.Constant(size)
        return self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        names = {"Max": "max", "Min": "min", "math.floor": "floor", "math.ceil": "ceil", "math.trunc": "trunc"}
        name = names.get(ast.unparse(node.func))
        return ast.Call(ast.Name(name, ast.Load()), node.args, []) if name else node


def _translate(guard: str, shapes: Mapping[str, tuple[int | str, ...]]) -> str:
    try:
        condition = ast.unparse(_Sizes(shapes).visit(ast.parse(guard, mode="eval").body))
        holds(condition, dict.fromkeys(names_in(condition), _TORCH_LEAST))
    except ZeroDivisionError:
        return condition
    except (SyntaxError, ProgramError, IndexError) as error:
        raise TraceError(
            f"the model decides by {guard}, which a Program cannot check at a call",
            hint="fix the sizes it depends on with dynamic=",
        ) from error
    return condition


def _seems_always_true(condition: str) -> bool:
    names = sorted(names_in(condition))
    constants = {int(text) + shift for text in re.findall(r"\b\d+\b", condition) for shift in (-1, 0, 1)}
    probes = sorted({*_PROBES, *(value for value in constants if value > 0)})
    if len(names) > 2:
        probes = probes[:: len(probes) // 6]
    try:
        return all(
            holds(condition, dict(zip(names, sizes, strict=True)))
            for sizes in itertools.product(probes, repeat=len(names))
        )
    except ZeroDivisionError:
        return False
