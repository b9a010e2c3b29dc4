"""Which sizes of the example inputs may vary, and example inputs on which they can be told apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from graphwright.frontends.torch.examples import Leaf
from graphwright.ir.errors import InputError

DynamicSpec = Mapping[str, Mapping[int, str]] | None
Roles = dict[int, dict[int, str]]


def assign_roles(leaves: list[Leaf], dynamic: DynamicSpec | str) -> Roles:
    """Name the dimensions that may vary: ``{leaf: {axis: name}}``.

    ``"auto"`` takes axis 0 of every tensor as ``batch``, and axis 1 as ``sequence`` where the tensor is a matrix of
    integers or a three-dimensional float; tensors of another size there get a name of their own. A mapping
    ``{input: {axis: name}}`` says it outright; ``None`` fixes every size.

    Raises:
        InputError: the mapping names an input or axis that does not exist, or one name stands for two sizes.
    """
    if dynamic is None:
        return {}
    if dynamic == "auto":
        return _automatic(leaves)
    if not isinstance(dynamic, Mapping):
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
        if not isinstance(axes, Mapping):
            raise InputError(f"must be a mapping {{axis: name}}, not {axes!r}", where=f"dynamic[{name!r}]")
        for axis, dim in axes.items():
            where = f"dynamic[{name!r}][{axis!r}]"
            if isinstance(axis, bool) or not isinstance(axis, int) or not 0 <= axis < leaf.value.dim():
                raise InputError(f"there is no such axis, the input has shape {list(leaf.value.shape)}", where=where)
            if not isinstance(dim, str) or not dim.isidentifier():
                raise InputError(f"{dim!r} is not a name", where=where, hint="use letters, digits and _")
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


def names_of(roles: Roles) -> list[str]:
    """The dimension names in order of first use."""
    return list(dict.fromkeys(name for axes in roles.values() for name in axes.values()))


def keep(roles: Roles, names: Sequence[str]) -> Roles:
    """The roles with these names only."""
    kept = {index: {axis: name for axis, name in axes.items() if name in names} for index, axes in roles.items()}
    return {index: axes for index, axes in kept.items() if axes}


def sizes_of(leaves: list[Leaf], roles: Roles) -> dict[str, int]:
    """The size each named dimension has in the example inputs."""
    return {name: int(leaf.value.shape[axis]) for leaf in leaves for axis, name in roles.get(leaf.index, {}).items()}


def widened_sizes(leaves: list[Leaf], roles: Roles) -> dict[str, int]:
    """Sizes to trace with: the examples', made at least 2 and different from each other.

    torch.export burns in a size of 1 and unites two dimensions of one size, so tracing needs neither to occur.
    """
    wanted: dict[str, int] = {}
    for name, size in sizes_of(leaves, roles).items():
        size = max(size, 2)
        while size in wanted.values():
            size += 1
        wanted[name] = size
    return wanted


def resized(leaves: list[Leaf], roles: Roles, sizes: Mapping[str, int]) -> list[Any]:
    """Leaf values with the named dimensions at other sizes, rows repeated or left out.

    Every tensor is a new one: tracing takes two inputs that are the same object for one input.

    Raises:
        InputError: a dimension to be enlarged is empty.
    """
    values: list[Any] = []
    for leaf in leaves:
        value = leaf.value
        if isinstance(value, torch.Tensor):
            value = value.detach().clone(memory_format=torch.contiguous_format)
            for axis, name in roles.get(leaf.index, {}).items():
                value = _resize(value, axis, sizes[name], leaf.name)
        values.append(value)
    return values


def _resize(value: torch.Tensor, axis: int, size: int, name: str) -> torch.Tensor:
    present = int(value.shape[axis])
    if size == present:
        return value
    if present == 0:
        raise InputError(
            f"is empty in dimension {axis}", where=f"example input {name!r}", hint="give at least one element"
        )
    index = torch.arange(size, device=value.device) % present
    return value.index_select(axis, index)
