"""Reading types, and comparing a written one with the one that torch infers."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from graphwright.ir.conditions import holds, names_in
from graphwright.ir.errors import ProgramError
from graphwright.ir.lexer import Lexer
from graphwright.ir.types import DTYPES_BY_NAME, Dim, ScalarType, TensorType, TupleType, ValueType

_SCALARS = ("int", "float", "bool")


def read_type(lexer: Lexer) -> ValueType | None:
    """A type at the lexer's position: ``f32[batch, 16]``, ``int(2*batch)``, ``(f32[2], i64[2])``, or ``None``.

    Raises:
        ProgramError: something else stands there.
    """
    if lexer.accept("("):
        items: list[ValueType | None] = []
        while not lexer.accept(")"):
            items.append(read_type(lexer))
            if not lexer.accept(","):
                lexer.expect(")")
                break
        return TupleType(tuple(items))
    start, word = lexer.place(), lexer.take("word", "a type")
    if word == "None":
        return None
    if word in _SCALARS and lexer.accept("("):
        expression = lexer.size()
        lexer.expect(")")
        return ScalarType(word, expression)
    dtype = DTYPES_BY_NAME.get(word) or getattr(torch, word.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        names = ", ".join(DTYPES_BY_NAME)
        raise lexer.error(f"'{word}' is not a type", at=start, hint=f"element types are {names}")
    lexer.expect("[")
    shape: list[int | str] = []
    while not lexer.accept("]"):
        size = lexer.size()
        shape.append(int(size) if size.isdigit() else size)
        if not lexer.accept(","):
            lexer.expect("]")
            break
    return TensorType(dtype, tuple(shape))


class Agreement:
    """Whether types are one, though another release of torch may have spelled a size in it differently."""

    def __init__(self, dims: Mapping[str, Dim]) -> None:
        # Sizes at which two spellings are compared.
        self._samples = [{name: start + 10 * place for place, name in enumerate(dims)} for start in (7, 13, 29)]
        self._dims = set(dims)
        self._unbacked: dict[str, str] = {}

    def __call__(self, inferred: ValueType | None, written: ValueType | None) -> bool:
        """Whether the two agree; to be asked in the order of the text."""
        if inferred == written:
            return True
        if isinstance(inferred, TensorType) and isinstance(written, TensorType):
            same_rank = inferred.dtype == written.dtype and len(inferred.shape) == len(written.shape)
            return same_rank and all(map(self._same_size, inferred.shape, written.shape))
        if isinstance(inferred, ScalarType) and isinstance(written, ScalarType):
            return inferred.kind == written.kind and self._same_size(inferred.expression, written.expression)
        if isinstance(inferred, TupleType) and isinstance(written, TupleType):
            return len(inferred.items) == len(written.items) and all(map(self, inferred.items, written.items))
        return False

    def _same_size(self, inferred: int | str, written: int | str) -> bool:
        if inferred == written:
            return True
        if isinstance(inferred, int) or isinstance(written, int):
            return False
        try:
            if names_in(inferred) <= self._dims:
                return all(holds(f"({inferred}) == ({written})", sizes) for sizes in self._samples)
        except (ProgramError, ArithmeticError):
            return False
        # Sizes that depend on values have no names of their own; their numbers say only which of them are equal.
        return self._unbacked.setdefault(written, inferred) == inferred
