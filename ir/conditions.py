"""Conditions on dimensions: what sizes must satisfy for a call to take the path that was traced.

A condition is a Python expression over dimension names, such as ``sequence % 2 == 0`` or ``batch < sequence``. It is
read by the small evaluator below, never by ``eval``, so that a saved program can hold it.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from graphwright.ir.errors import ProgramError

_BINARY: dict[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Div: operator.truediv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "max": max,
    "min": min,
    "floor": math.floor,
    "ceil": math.ceil,
    "trunc": math.trunc,
    "Max": max,
    "Min": min,
    "Mod": operator.mod,
}


def holds(condition: str, sizes: Mapping[str, Any]) -> bool:
    """Whether a condition holds for these sizes (integers, or symbols with integer arithmetic).

    Raises:
        ProgramError: the condition is not such an expression, or names a dimension that has no size here.
    """
    return bool(_evaluate(_parse(condition), sizes))


def evaluate(expression: str, sizes: Mapping[str, int]) -> int:
    """The value of a size such as ``2*batch`` for these sizes.

    Raises:
        ProgramError: it is not such an expression, or names a dimension that has no size here.
    """
    return int(_evaluate(_parse(expression), sizes))


def names_in(condition: str) -> set[str]:
    """The dimensions a condition speaks of.

    Raises:
        ProgramError: it is not an expression.
    """
    return {node.id for node in ast.walk(_parse(condition)) if isinstance(node, ast.Name)} - set(_FUNCTIONS)


def is_bound(condition: str) -> bool:
    """Whether a condition only compares one dimension with a number, as ``Dim.min`` and ``Dim.max`` do."""
    tree = _parse(condition)
    return (
        isinstance(tree, ast.Compare)
        and len(tree.ops) == 1
        and isinstance(tree.ops[0], ast.Lt | ast.LtE | ast.Gt | ast.GtE)
        and isinstance(tree.left, ast.Name)
        and isinstance(tree.comparators[0], ast.Constant)
    )


@lru_cache(maxsize=256)
def _parse(condition: str) -> ast.expr:
    try:
        return ast.parse(condition, mode="eval").body
    except SyntaxError as error:
        raise ProgramError(f"{condition!r} is not a condition on dimensions") from error


def _evaluate(node: ast.expr, sizes: Mapping[str, Any]) -> Any:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return node.value
    if isinstance(node, ast.Name) and node.id in sizes:
        return sizes[node.id]
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        return _BINARY[type(node.op)](_evaluate(node.left, sizes), _evaluate(node.right, sizes))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Not):
        value = _evaluate(node.operand, sizes)
        return -value if isinstance(node.op, ast.USub) else not value
    if isinstance(node, ast.BoolOp):
        parts = (bool(_evaluate(value, sizes)) for value in node.values)
        return any(parts) if isinstance(node.op, ast.Or) else all(parts)
    if isinstance(node, ast.Compare):
        values = [_evaluate(value, sizes) for value in (node.left, *node.comparators)]
        results = (_BINARY[type(op)](a, b) for op, a, b in zip(node.ops, values, values[1:]))
        return all(bool(result) for result in results)
    if (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in _FUNCTIONS
        and not node.keywords
    ):
        return _FUNCTIONS[node.func.id](*(_evaluate(value, sizes) for value in node.args))
    raise ProgramError(f"{ast.unparse(node)!r} cannot stand in a condition on dimensions")
