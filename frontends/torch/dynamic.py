"""Which sizes of the example inputs may vary, and example inputs on which they can be told apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from graphwright.ir.errors import InputError

DynamicSpec = Mapping[str, Mapping[int, str]] | None
Roles = dict[int, dict[int, str]]


@dataclass(frozen=True)
class Leaf:
    """One leaf of the example inputs: its position in the tree and a name for messages."""

    index: int
    name: str
    value: Any


def leaves_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Leaf]:
    """The leaves of the example inputs with readable names: ``input_ids``, ``pixel_values.0``."""
    found: list[Leaf] = []
    for index, (path, value) in enumerate(pytree.tree_flatten_with_path((args, kwargs))[0]):
        parts = [str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path[1:]]
        found.append(Leaf(index, ".".join(parts), value))
    return found


def assign_roles(leaves: list[Leaf], dynamic: DynamicSpec | str) -> Roles:
    """Name the dimensions that may vary: ``{leaf: {axis: name}}``.

    ``"auto"`` takes axis 0 of every tensor as ``batch``, and axis 1 as ``sequence`` where the tensor is a matrix of
    integers or a three-dimensional float; tensors of another size there get a name of their own. A mapping
    ``{input: {axis: name}}`` says it outright; ``None`` fixes every size.

    Raises:
        InputError: the mapping names an input or axis that does not exist.
    """
    if dynamic is None:
        return {}
    if dynamic == "auto":
        return _automatic(leaves)
    if isinstance(dynamic, str):
        raise InputError(f"must be 'auto', None or a mapping, not {dynamic!r}", where="argument 'dynamic'")
    by_name = {leaf.name: leaf for leaf in leaves if isinstance(leaf.value, torch.Tensor)}
    roles: Roles = {}
    for name, axes in dynamic.items():
        leaf = by_name.get(name)
        if leaf is None:
            raise InputError(
                "is not among the example inputs",
                where=f"dynamic[{name!r}]",
                hint=f"tensor inputs: {', '.join(by_name)}",
            )
        for axis, dim in axes.items():
            if not 0 <= axis < leaf.value.dim():
                raise InputError(
                    f"axis {axis} does not exist, the input has shape {list(leaf.value.shape)}",
                    where=f"dynamic[{name!r}]",
                )
            if not dim.isidentifier():
                raise InputError(
                    f"{dim!r} is not a name", where=f"dynamic[{name!r}][{axis}]", hint="use letters, digits and _"
                )
            roles.setdefault(leaf.index, {})[axis] = dim
    _check_equal_sizes(leaves, roles)
    return roles


def _automatic(leaves: list[Leaf]) -> Roles:
    roles: Roles = {}
    sizes: dict[str, int] = {}
    for leaf in leaves:
        value = leaf.value
        if not isinstance(value, torch.Tensor) or value.dim() == 0:
            continue
        axes = {0: "batch"}
        integers = not value.is_floating_point() and not value.is_complex()
        if (value.dim() == 2 and integers) or (value.dim() == 3 and not integers):
            axes[1] = "sequence"
        named: dict[int, str] = {}
        for axis, role in axes.items():
            size = int(value.shape[axis])
            name = role if sizes.setdefault(role, size) == size else f"{leaf.name.replace('.', '_')}_{axis}"
            sizes.setdefault(name, size)
            named[axis] = name
        roles[leaf.index] = named
    return roles


def _check_equal_sizes(leaves: list[Leaf], roles: Roles) -> None:
    sizes: dict[str, tuple[int, str]] = {}
    for leaf in leaves:
        for axis, name in roles.get(leaf.index, {}).items():
            size, first = sizes.setdefault(name, (int(leaf.value.shape[axis]), leaf.name))
            if size != leaf.value.shape[axis]:
                raise InputError(
                    f"the dimension {name!r} is {size} in {first!r} and {leaf.value.shape[axis]} in {leaf.name!r}",
                    where="example inputs",
                )


def widen(leaves: list[Leaf], roles: Roles) -> list[Any]:
    """Leaf values whose varying dimensions have sizes of 2 and more, different from each other.

    torch.export burns in a size of 1 and unites two dimensions of one size, so tracing needs neither to occur.
    """
    wanted: dict[str, int] = {}
    for leaf in leaves:
        for axis, name in roles.get(leaf.index, {}).items():
            if name not in wanted:
                size = max(int(leaf.value.shape[axis]), 2)
                while size in wanted.values():
                    size += 1
                wanted[name] = size
    return [
        resize(leaf.value, {axis: wanted[name] for axis, name in roles.get(leaf.index, {}).items()}) for leaf in leaves
    ]


def resize(value: Any, sizes: Mapping[int, int]) -> Any:
    """A tensor repeated or cut to the given sizes along the given axes."""
    for axis, size in sizes.items():
        present = int(value.shape[axis])
        if size == present:
            continue
        if present == 0:
            raise InputError(
                "has an empty dimension", where="example inputs", hint="give examples with at least one element"
            )
        index = torch.arange(size, device=value.device) % present
        value = value.index_select(axis, index)
    return value
