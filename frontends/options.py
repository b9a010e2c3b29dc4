"""Options of passes from plain data (TOML, command line): names checked, values in the types of the fields."""

from __future__ import annotations

import collections.abc
import dataclasses
import difflib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from graphwright.ir.errors import InputError, RecipeError
from graphwright.passes import registry
from graphwright.passes.adapters.base import AdapterKind
from graphwright.passes.adapters.kinds import KINDS, kind_of
from graphwright.passes.base import Pass
from graphwright.passes.pipeline import Pipeline
from graphwright.passes.quantization.rounding import METHODS, Rounding, rounding_of
from graphwright.passes.selection import Select, Where
from graphwright.passes.sparsity.methods import METHODS as PRUNING
from graphwright.passes.sparsity.methods import PruningMethod, method_of

# TOML has no null; this stands for it where an option may be absent.
NONE = "none"
# The option of passes that learn from typical inputs.
CALIBRATION = "calibration"

Locate = Callable[[str | None], str]


@dataclasses.dataclass(frozen=True)
class Family:
    """Options that are one of several classes, each with options of its own, written as a table.

    Attributes:
        base: of the classes.
        words: what it is in messages.
        key: under which a table has the name of the class; that class has it as an attribute too.
        known: all names.
        named: the class of a name.
    """

    base: type
    words: str
    key: str
    known: Sequence[str]
    named: Callable[[Any], type]


FAMILIES = (
    Family(Rounding, "rounding method", "method", tuple(METHODS), lambda name: type(rounding_of(name, where="method"))),
    Family(
        PruningMethod, "pruning method", "method", tuple(PRUNING), lambda name: type(method_of(name, where="method"))
    ),
    Family(AdapterKind, "adapter", "kind", tuple(KINDS), lambda name: type(kind_of(name, where="kind"))),
)


def read_pass(table: Mapping[str, Any], where: Locate) -> Pass:
    """A pass from a table with its ``name`` and options; ``where`` says where an option (or the table) stands.

    Raises:
        RecipeError: no such pass or option, or a value that does not fit.
    """
    options = dict(table)
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise RecipeError(
            "has no name" if name is None else f"a pass name is a string, not {name!r}",
            where=where("name"),
            hint=f'write name = "..."; passes: {", ".join(registry.names())}',
        )
    try:
        kind = Pipeline if name == Pipeline.name else registry.get(name)
    except InputError as error:
        raise RecipeError(error.what, where=where("name"), hint=error.hint) from error
    values = read_options(kind, options, where, owner=f"the pass {name!r}")
    try:
        return kind(**values)
    except InputError as error:
        option = next((key for key in options if key in str(error)), None)
        raise RecipeError(str(error).splitlines()[0], where=where(option), hint=error.hint) from error
    except TypeError as error:
        raise RecipeError(f"the pass {name!r} does not take these options: {error}", where=where(None)) from error


def read_options(kind: type, options: Mapping[str, Any], where: Locate, owner: str | None = None) -> dict[str, Any]:
    """The option values in the types the fields have.

    Raises:
        RecipeError: an unknown option, or a value of another type.
    """
    hints = field_types(kind)
    known = [item.name for item in dataclasses.fields(kind) if item.init]
    values: dict[str, Any] = {}
    for key, value in options.items():
        if key not in known:
            raise RecipeError(
                f"{owner or kind.__name__} has no option {key!r}", where=where(key), hint=nearest(key, known)
            )
        try:
            values[key] = _convert(value, hints[key], _at(where, key))
        except _WrongType as error:
            wanted = describe_type(hints[key])
            raise RecipeError(f"the option {key!r} must be {wanted}, not {error.value!r}", where=where(key)) from None
    return values


def _at(where: Locate, key: str) -> Locate:
    """Inside an option, every place is that option's."""
    return lambda _: where(key)


def field_types(kind: type) -> dict[str, Any]:
    """Types of the fields; unknown ones where a foreign class names types that only its type checker sees."""
    try:
        hints: dict[str, Any] = typing.get_type_hints(kind)
    except NameError:
        hints = {item.name: Any for item in dataclasses.fields(kind)}
    return hints


class _WrongType(Exception):
    def __init__(self, value: Any) -> None:
        super().__init__(value)
        self.value = value


def _convert(value: Any, hint: Any, where: Locate) -> Any:
    """A TOML value as a field of this type takes it."""
    if hint is Any:
        return value
    if hint == Where:
        return _selection(value, where)
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if type(None) in inner and value == NONE:
            return None
        for choice in inner:
            try:
                return _convert(value, choice, where)
            except _WrongType:
                continue
        raise _WrongType(value)
    if origin is typing.Literal:
        if value not in inner or type(value) not in {type(item) for item in inner}:
            raise _WrongType(value)
        return value
    if origin in (tuple, list, collections.abc.Sequence) or hint in (tuple, list):
        if not isinstance(value, list):
            raise _WrongType(value)
        kinds = [inner[0]] * len(value) if inner and (len(inner) == 1 or inner[-1] is ...) else list(inner)
        kinds = kinds or [Any] * len(value)
        if len(kinds) != len(value):
            raise _WrongType(value)
        return tuple(_convert(item, kind, where) for item, kind in zip(value, kinds, strict=True))
    if origin in (dict, collections.abc.Mapping):
        if not isinstance(value, dict):
            raise _WrongType(value)
        return {key: _convert(item, inner[1], where) for key, item in value.items()} if inner else value
    if isinstance(hint, type):
        return _plain(value, hint, where)
    return value


def _plain(value: Any, kind: type, where: Locate) -> Any:
    family = next((each for each in FAMILIES if issubclass(kind, each.base)), None)
    if family is not None:
        if not isinstance(value, dict):
            raise _WrongType(value)
        return _member(family, value, where)
    if issubclass(kind, Pass):
        if not isinstance(value, dict):
            raise _WrongType(value)
        return read_pass(value, where)
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return kind(**read_options(kind, value, where))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool and kind is not object):
        raise _WrongType(value)
    return value


def _member(family: Family, table: Mapping[str, Any], where: Locate) -> Any:
    """One of a family from a table of its name and its options."""
    options = dict(table)
    name = options.pop(family.key, None)
    if name is None:
        raise RecipeError(
            f"the table of the {family.words} has no {family.key!r}",
            where=where(None),
            hint=f"{family.key}s: {', '.join(family.known)}",
        )
    try:
        kind = family.named(name)
        return kind(**read_options(kind, options, where, owner=f"the {family.words} {name!r}"))
    except RecipeError:
        raise
    except InputError as error:
        raise RecipeError(str(error).splitlines()[0], where=where(None), hint=error.hint) from error


def _selection(value: Any, where: Locate) -> Where:
    if value == NONE:
        return None
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return tuple(_selection(item, where) for item in value)
    if isinstance(value, dict):
        known = [item.name for item in dataclasses.fields(Select)]
        for key in value:
            if key not in known:
                raise RecipeError(f"a selection has no property {key!r}", where=where(None), hint=nearest(key, known))
        shape = value.get("shape")
        if shape is not None:
            value = {**value, "shape": tuple(None if size == NONE else size for size in shape)}
        return Select(**value)
    raise _WrongType(value)


def describe_type(hint: Any) -> str:
    """What an option of this type takes, in words."""
    if hint == Where:
        return "a glob, 're:<regex>', a table of path/op/shape, or a list of these"
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(f'"{NONE}"' if item is type(None) else describe_type(item) for item in inner)
    if origin is typing.Literal:
        return " or ".join(repr(item) for item in inner)
    if origin in (tuple, list, collections.abc.Sequence):
        return "a list"
    names = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def nearest(name: str, known: Sequence[str]) -> str:
    """A hint: the known name that is spelt most like this one, or all of them."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
