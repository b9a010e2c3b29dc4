"""A signature as text: how a call's arguments and results are nested, in a form that reads back.

Containers are written as in Python; ``input "x"`` is a leaf fed by that input, a constant is one that was traced in,
``*`` is an output. Any other container is written as its registered type, its context as JSON, and its children::

    type "transformers.modeling_outputs.BaseModelOutput" ["last_hidden_state"] (*)

The types are those that ``torch.utils._pytree`` knows; the module of an unknown one is imported when it is read back.
"""

from __future__ import annotations

import collections
import dataclasses
import importlib
import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from graphwright.ir.errors import ProgramError
from graphwright.ir.literals import format_value
from graphwright.ir.signature import Signature

if TYPE_CHECKING:
    from graphwright.ir.lexer import Lexer

_PROTOCOL = 1
_LEAF: dict[str, Any] = {"type": None, "context": None, "children_spec": []}
_TUPLE, _LIST, _DICT = "builtins.tuple", "builtins.list", "builtins.dict"
_NAMED_TUPLE = "collections.namedtuple"


def default_signature(inputs: Sequence[str], results: int) -> Signature:
    """What a program without a written signature has: inputs by position; one result, or a tuple of them."""
    return Signature(
        in_spec=pytree.tree_structure((tuple(inputs), {})),
        out_spec=pytree.tree_structure(0 if results == 1 else (0,) * results),
        inputs=tuple(inputs),
        constants={},
        parameters=tuple(inputs),
    )


# -- writing -----------------------------------------------------------------------------------------------------------


def signature_lines(signature: Signature) -> list[str]:
    """The header lines of a signature; one that cannot be written is shown with a question mark."""

    def leaf(index: int) -> str:
        name = signature.inputs[index]
        return format_value(signature.constants.get(index)) if name is None else f"input {json.dumps(name)}"

    lines = [f"forward {', '.join(signature.parameters)}"] if signature.parameters else []
    try:
        takes = _written(describe_tree(signature.in_spec), iter(map(leaf, range(len(signature.inputs)))))
        gives = _written(describe_tree(signature.out_spec), iter(lambda: "*", None))
    except ProgramError as error:
        return [*lines, f"takes ?{json.dumps(error.what)}"]
    return [*lines, f"takes {takes}", f"gives {gives}"]


def describe_tree(spec: pytree.TreeSpec) -> dict[str, Any]:
    """A tree as JSON values: ``{"type", "context", "children_spec"}``, leaves with type ``None``.

    Raises:
        ProgramError: the tree holds a type that cannot be found again by its name.
    """
    for kind in _types_in(spec):
        if kind not in pytree.SUPPORTED_SERIALIZED_TYPES:
            _register(kind, f"{kind.__module__}.{kind.__qualname__}")
    try:
        text = pytree.treespec_dumps(spec, _PROTOCOL)
        found = pytree.treespec_loads(text)
    except (NotImplementedError, TypeError, ValueError) as error:
        raise ProgramError(f"the nesting of the model's arguments or results cannot be written: {error}") from error
    if found != spec:
        raise ProgramError(f"the nesting {spec} does not survive being written", hint="use str or int keys in dicts")
    tree: dict[str, Any] = json.loads(text)[1]
    return tree


def _types_in(spec: pytree.TreeSpec) -> Iterator[Any]:
    if not spec.is_leaf():
        yield spec.context if spec.type is collections.namedtuple else spec.type
        for child in spec.children():
            yield from _types_in(child)


def _written(tree: dict[str, Any], leaves: Iterator[str]) -> str:
    kind, context, children = tree["type"], tree["context"], tree["children_spec"]
    if kind is None:
        return next(leaves)
    keys = json.loads(context) if kind == _DICT else None
    if keys is not None and all(isinstance(key, str) for key in keys):
        items = (f"{json.dumps(key)}: {_written(child, leaves)}" for key, child in zip(keys, children, strict=True))
        return f"{{{', '.join(items)}}}"
    inner = ", ".join([_written(child, leaves) for child in children])
    if kind == _TUPLE:
        return f"({inner}{',' if len(children) == 1 else ''})"
    if kind == _LIST:
        return f"[{inner}]"
    # The context is JSON inside of a string, for most types.
    shown = context if isinstance(context, str) and _is_plain_json(context) else f"context {json.dumps(context)}"
    return f"type {json.dumps(kind)} {shown} ({inner})"


def _is_plain_json(text: str) -> bool:
    try:
        return json.dumps(json.loads(text)) == text
    except json.JSONDecodeError:
        return False


# -- reading -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Leaf:
    """A leaf of a tree that was read: an input by name, a constant, or (in results) neither."""

    name: str | None = None
    constant: Any = None


def read_tree(lexer: Lexer, read_leaf: Any) -> tuple[pytree.TreeSpec, list[Leaf]]:
    """A tree at the lexer's position, and its leaves in order.

    Args:
        lexer: stands before the tree.
        read_leaf: reads one leaf.

    Raises:
        ProgramError: not a tree, or a type in it cannot be found.
    """
    leaves: list[Leaf] = []
    start = lexer.place()
    tree = _read(lexer, read_leaf, leaves)
    try:
        for kind, context in _names_in(tree):
            _ensure_registered(context if kind == _NAMED_TUPLE else kind)
        return pytree.treespec_loads(json.dumps([_PROTOCOL, tree])), leaves
    except ProgramError as error:
        raise lexer.error(error.what, at=start, hint=error.hint) from error
    except (NotImplementedError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise lexer.error(f"the nesting cannot be rebuilt: {error}", at=start) from error


def _read(lexer: Lexer, read_leaf: Any, leaves: list[Leaf]) -> dict[str, Any]:
    if lexer.accept("("):
        return _node(_TUPLE, "null", _children(lexer, read_leaf, leaves, ")"))
    if lexer.accept("["):
        return _node(_LIST, "null", _children(lexer, read_leaf, leaves, "]"))
    if lexer.accept("{"):
        keys: list[str] = []
        children: list[dict[str, Any]] = []
        while not lexer.accept("}"):
            keys.append(lexer.string("a key in quotes"))
            lexer.expect(":")
            children.append(_read(lexer, read_leaf, leaves))
            if not lexer.accept(","):
                lexer.expect("}")
                break
        return _node(_DICT, json.dumps(keys), children)
    if lexer.accept("type"):
        kind = lexer.string("the name of a type")
        context: Any = lexer.json() if lexer.accept("context") else json.dumps(lexer.json())
        lexer.expect("(")
        return _node(kind, context, _children(lexer, read_leaf, leaves, ")"))
    leaves.append(read_leaf(lexer))
    return dict(_LEAF)


def _node(kind: str, context: Any, children: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": kind, "context": context, "children_spec": children}


def _children(lexer: Lexer, read_leaf: Any, leaves: list[Leaf], closing: str) -> list[dict[str, Any]]:
    children: list[dict[str, Any]] = []
    while not lexer.accept(closing):
        children.append(_read(lexer, read_leaf, leaves))
        if not lexer.accept(","):
            lexer.expect(closing)
            break
    return children


def _names_in(tree: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    if tree["type"] is not None:
        yield tree["type"], tree["context"]
        for child in tree["children_spec"]:
            yield from _names_in(child)


def _ensure_registered(name: str) -> None:
    """Make a container type known to torch by importing where it is defined.

    Only installed modules can be imported this way, and only dataclasses and named tuples are registered; other types
    register themselves when their module is imported, as those of transformers do.
    """
    if name in pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE:
        return
    module, _, qualified = name.rpartition(".")
    while module:
        try:
            found: Any = importlib.import_module(module)
            break
        except ModuleNotFoundError as error:
            if error.name is not None and not f"{module}.".startswith(f"{error.name}."):
                raise _missing(name, error.name) from error
            if "." not in module:
                raise _missing(name, module) from error
            module, _, outer = module.rpartition(".")
            qualified = f"{outer}.{qualified}"
        except ImportError as error:
            raise ProgramError(f"the module of {name} cannot be imported: {error}") from error
    else:
        raise ProgramError(f"{name!r} is not the full name of a type")
    if name in pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE:
        return
    for part in qualified.split("."):
        found = getattr(found, part, None)
    if not isinstance(found, type):
        raise ProgramError(f"the module {module} has no type {qualified!r} any more")
    _register(found, name)


def _missing(name: str, module: str) -> ProgramError:
    package = module.partition(".")[0]
    hint = f"pip install {package}" if package == "transformers" else f"make {package!r} importable"
    return ProgramError(f"the program was made with the type {name}, and there is no module {module!r} here", hint=hint)


def _register(kind: Any, name: str) -> None:
    if name in pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE:
        return
    if "<locals>" in name or name.startswith("__main__."):
        raise ProgramError(
            f"the type {name} cannot be found again in another process",
            hint="define it at the top level of a module that can be imported",
        )
    if pytree.is_namedtuple_class(kind):
        pytree._register_namedtuple(kind, serialized_type_name=name)
    elif isinstance(kind, type) and dataclasses.is_dataclass(kind):
        torch.export.register_dataclass(kind, serialized_type_name=name)
    else:
        raise ProgramError(
            f"the type {name} has no written form",
            hint="register it with torch.utils._pytree.register_pytree_node(serialized_type_name=...)",
        )
