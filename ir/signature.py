"""How a program is called: the original's arguments in, the original's output type out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from graphwright.ir.errors import InputError


@dataclass(frozen=True)
class Signature:
    """Flattening of the original's arguments to the graph's inputs, and of the graph's outputs to the original's type.

    Attributes:
        in_spec: tree of ``(args, kwargs)`` as traced.
        out_spec: tree of the output as traced.
        inputs: for every leaf of ``in_spec`` the placeholder it feeds, or ``None`` where a constant was traced in.
        constants: the traced constants by leaf position, such as ``use_cache=False``.
        parameters: parameter names of the original forward in order, so that a traced keyword may be passed by
            position.
    """

    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    inputs: tuple[str | None, ...]
    constants: Mapping[int, Any]
    parameters: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Graph inputs in order."""
        return tuple(name for name in self.inputs if name is not None)

    def with_keyword(self, keyword: str, name: str) -> Signature:
        """The signature with one more argument, given by keyword.

        Args:
            keyword: what callers call it.
            name: of the graph's input that it feeds, behind all others.

        Raises:
            InputError: there is an argument of that name.
        """
        kwargs_spec = self.in_spec.children()[1]
        if keyword in (*self.parameters, *kwargs_spec.context):
            raise InputError("is an argument of the program already", where=f"input {keyword!r}")
        args, kwargs = pytree.tree_unflatten(list(range(self.in_spec.num_leaves)), self.in_spec)
        spec = pytree.tree_structure((args, {**kwargs, keyword: 0}))
        return replace(self, in_spec=spec, inputs=(*self.inputs, name))

    def keyword_of(self, name: str) -> str:
        """What callers call a graph input that they give by keyword; its own name for any other."""
        args_spec, kwargs_spec = self.in_spec.children()
        leaf = args_spec.num_leaves
        for keyword, child in zip(kwargs_spec.context, kwargs_spec.children(), strict=True):
            if child.num_leaves == 1 and self.inputs[leaf] == name:
                return str(keyword)
            leaf += child.num_leaves
        return name

    def flatten(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
        """The graph inputs of a call.

        Raises:
            InputError: an argument is missing, unknown, of another structure, or differs from a traced constant.
        """
        call_args, call_kwargs = self._bind(args, kwargs)
        leaves, spec = pytree.tree_flatten((call_args, call_kwargs))
        if spec != self.in_spec:
            raise InputError(
                "the arguments are nested differently from the traced ones",
                hint=f"traced: {self.in_spec}; this call: {spec}",
            )
        flat: list[torch.Tensor] = []
        for index, (leaf, name) in enumerate(zip(leaves, self.inputs, strict=True)):
            if name is None:
                traced = self.constants.get(index)
                if leaf is not traced and not (type(leaf) is type(traced) and leaf == traced):
                    raise InputError(
                        f"the model was traced with the constant {traced!r}, this call passes {leaf!r}",
                        hint="trace the model again with the value you need",
                    )
                continue
            if not isinstance(leaf, torch.Tensor):
                raise InputError(f"must be a tensor, not {type(leaf).__name__}", where=f"input {name!r}")
            flat.append(leaf)
        return flat

    def unflatten(self, outputs: Sequence[Any]) -> Any:
        """The original's output value from the graph's flat outputs."""
        return pytree.tree_unflatten(list(outputs), self.out_spec)

    def output_names(self) -> list[str]:
        """A readable name for every flat output, such as ``last_hidden_state``."""
        dummy = pytree.tree_unflatten(list(range(self.out_spec.num_leaves)), self.out_spec)
        names: list[str] = []
        for path, _ in pytree.tree_flatten_with_path(dummy)[0]:
            parts = [str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path]
            text = "_".join(filter(None, parts))
            names.append(text if text and not text[0].isdigit() else f"output_{text or 0}")
        return names

    def tensor_arguments(self) -> list[str]:
        """Names of the arguments that hold tensors; one that has no name has its number."""
        args_spec, kwargs_spec = self.in_spec.children()
        names = [
            self.parameters[index] if index < len(self.parameters) else str(index)
            for index in range(args_spec.num_children)
        ]
        found, leaf = [], 0
        children = [*args_spec.children(), *kwargs_spec.children()]
        for name, child in zip([*names, *kwargs_spec.context], children, strict=True):
            if any(each is not None for each in self.inputs[leaf : leaf + child.num_leaves]):
                found.append(name)
            leaf += child.num_leaves
        return found

    def _bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args_spec, kwargs_spec = self.in_spec.children()
        positional, keywords = args_spec.num_children, list(kwargs_spec.context)
        given = dict(kwargs)
        call_args = list(args[:positional])
        for name in self.parameters[: len(call_args)]:
            if name in given:
                raise InputError("is passed both by position and by name", where=f"argument {name!r}")
        for index, value in enumerate(args[positional:], start=positional):
            if index >= len(self.parameters):
                raise InputError(
                    f"takes at most {len(self.parameters) or positional} positional arguments, got {len(args)}"
                )
            name = self.parameters[index]
            if name in given:
                raise InputError("is passed both by position and by name", where=f"argument {name!r}")
            given[name] = value
        for index in range(len(call_args), positional):
            name = self.parameters[index] if index < len(self.parameters) else f"#{index}"
            if name not in given:
                raise InputError("is missing", where=f"argument {name!r}")
            call_args.append(given.pop(name))
        missing = [name for name in keywords if name not in given]
        for name in missing:
            # A traced None or constant may be left out of a call, as in the original.
            value = self._constant_keyword(name)
            if value is _ABSENT:
                raise InputError(
                    "is missing", where=f"argument {name!r}", hint=f"this program takes {', '.join(keywords)}"
                )
            given[name] = value
        unknown = [name for name in given if name not in keywords and given[name] is not None]
        if unknown:
            raise InputError(
                "was not among the traced arguments",
                where=f"argument {unknown[0]!r}",
                hint=f"this program takes {', '.join(keywords) or f'{positional} positional arguments'}",
            )
        return tuple(call_args), {name: given[name] for name in keywords}

    def _constant_keyword(self, name: str) -> Any:
        args_spec, kwargs_spec = self.in_spec.children()
        leaf = args_spec.num_leaves
        for keyword, child in zip(kwargs_spec.context, kwargs_spec.children(), strict=True):
            if keyword == name:
                traced_constant = child.num_leaves == 1 and self.inputs[leaf] is None
                return self.constants.get(leaf) if traced_constant else _ABSENT
            leaf += child.num_leaves
        return _ABSENT


_ABSENT = object()
