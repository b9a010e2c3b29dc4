"""Sizes as the executor computes them: instructions of a small stack machine (``csrc/plan.h``)."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence

from graphwright.ir.errors import BackendError

Size = list[int]

CONSTANT, SYMBOL = 0, 1
_BINARY: dict[type[ast.AST], int] = {ast.Add: 2, ast.Sub: 3, ast.Mult: 4, ast.FloorDiv: 5, ast.Mod: 6}
_FUNCTIONS = {"Max": 7, "max": 7, "Min": 8, "min": 8, "Mod": 6}


def size_code(size: int | str, symbols: Mapping[str, int]) -> Size:
    """A size as written in a type, such as ``2*batch``, for the executor.

    Args:
        size: a number or an expression over dimension names.
        symbols: the number of each dimension.

    Raises:
        BackendError: the executor cannot compute it.
    """
    if isinstance(size, int):
        return [CONSTANT, size]
    return _encode(ast.parse(size, mode="eval").body, symbols, size)


def shape_code(shape: Sequence[int | str], symbols: Mapping[str, int]) -> list[Size]:
    """The same for every size of a shape."""
    return [size_code(size, symbols) for size in shape]


def _encode(node: ast.expr, symbols: Mapping[str, int], text: str) -> Size:
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return [CONSTANT, node.value]
    if isinstance(node, ast.Name) and node.id in symbols:
        return [SYMBOL, symbols[node.id]]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return [CONSTANT, 0, *_encode(node.operand, symbols, text), _BINARY[ast.Sub]]
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        return [*_encode(node.left, symbols, text), *_encode(node.right, symbols, text), _BINARY[type(node.op)]]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS:
        code: Size = []
        for index, argument in enumerate(node.args):
            code += _encode(argument, symbols, text)
            code += [_FUNCTIONS[node.func.id]] if index else []
        return code
    raise BackendError(f"cannot compute the size {text!r} from the sizes of the inputs", where="executor")
