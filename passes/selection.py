"""``where=`` and ``ignore=``: which nodes a pass may touch, said the same way in every pass."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from graphwright.ir.errors import SelectionError
from graphwright.ir.names import op_name
from graphwright.ir.program import Program
from graphwright.ir.provenance import path_of
from graphwright.ir.types import TensorType


@dataclass(frozen=True)
class Select:
    """A selection by several properties at once; all that are given must hold.

    Attributes:
        path: glob or ``re:`` regex on the module path.
        op: glob on the operator as written, such as ``aten.linear``.
        shape: sizes of the result, ``None`` for any, such as ``(None, None, 768)``.
    """

    path: str | None = None
    op: str | None = None
    shape: tuple[int | str | None, ...] | None = None


Where = str | Select | Callable[[fx.Node], bool] | Sequence[Any] | None
Predicate = Callable[[fx.Node], bool]


def predicate(program: Program, where: Where, ignore: Where = None) -> Predicate:
    """The nodes that ``where`` selects (all, for ``None``) and ``ignore`` does not.

    A string is a glob on the module path (``model.layers.*.mlp``) or, with the prefix ``re:``, a regular expression
    that must match the whole path. A module that is selected brings all inside it. A sequence selects what any of its
    items selects.

    Raises:
        SelectionError: a malformed selection, or a ``where`` that selects nothing in this program.
    """
    chosen = _predicate(program, where, "where") if where is not None else _everything
    ignored = _predicate(program, ignore, "ignore") if ignore is not None else _nothing
    if where is not None and not any(chosen(node) for node in program.nodes if node.op == "call_function"):
        raise SelectionError("selects nothing in this program", where=f"where={where!r}", hint=_nearest(program, where))
    return lambda node: chosen(node) and not ignored(node)


def check(where: Where, label: str) -> None:
    """Check a selection without a program.

    Raises:
        SelectionError: it is malformed.
    """
    if where is None or callable(where) or isinstance(where, Select):
        paths = [where.path] if isinstance(where, Select) else []
    elif isinstance(where, str):
        paths = [where]
    elif isinstance(where, Sequence):
        for item in where:
            check(item, label)
        return
    else:
        raise SelectionError(
            f"{where!r} selects nothing: it is a {type(where).__name__}",
            where=f"{label}=",
            hint="give a glob, 're:<regex>', Select(...), a function of a node, or a list of these",
        )
    for path in paths:
        if path is not None and path.startswith("re:"):
            try:
                re.compile(path[3:])
            except re.error as error:
                raise SelectionError(f"not a regular expression: {error}", where=f"{label}={path!r}") from error


def _predicate(program: Program, where: Where, label: str) -> Predicate:
    check(where, label)
    if isinstance(where, str):
        matches = _path_matcher(where)
        return lambda node: matches(path_of(node))
    if isinstance(where, Select):
        return _selects(program, where)
    if callable(where):
        return where
    assert isinstance(where, Sequence)
    parts = [_predicate(program, item, label) for item in where]
    return lambda node: any(part(node) for part in parts)


def _selects(program: Program, select: Select) -> Predicate:
    matches = _path_matcher(select.path) if select.path is not None else None

    def chosen(node: fx.Node) -> bool:
        if matches is not None and not matches(path_of(node)):
            return False
        if select.op is not None and not fnmatch.fnmatchcase(op_name(node), select.op):
            return False
        if select.shape is None:
            return True
        kind = program.type_of(node)
        if not isinstance(kind, TensorType) or len(kind.shape) != len(select.shape):
            return False
        return all(wanted is None or wanted == size for wanted, size in zip(select.shape, kind.shape, strict=True))

    return chosen


def _path_matcher(pattern: str) -> Callable[[str], bool]:
    if pattern.startswith("re:"):
        compiled = re.compile(pattern[3:])
    else:
        compiled = re.compile(fnmatch.translate(pattern))

    def matches(path: str) -> bool:
        parts = path.split(".")
        return any(compiled.fullmatch(".".join(parts[:end])) for end in range(len(parts), 0, -1))

    return matches


def _nearest(program: Program, where: Where) -> str:
    paths = sorted({path_of(node) for node in program.nodes} - {""})
    if isinstance(where, str):
        near = difflib.get_close_matches(where.removeprefix("re:"), paths, n=3, cutoff=0.3)
        if near:
            return f"module paths like it: {', '.join(near)}"
    return f"module paths are such as {', '.join(paths[:3])}" if paths else "this program has no module paths"


def _everything(node: fx.Node) -> bool:
    return True


def _nothing(node: fx.Node) -> bool:
    return False
