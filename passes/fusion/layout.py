"""Where a tensor with wanted elements lies in a program, and the few views that bring it into a wanted layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphwright.ir.arguments import canonical_call
from graphwright.ir.names import resolve_target
from graphwright.ir.rewriter import Rewriter
from graphwright.ir.types import fake_of
from graphwright.passes.fusion.elements import Elements
from graphwright.passes.fusion.symbolic import (
    Element,
    Every,
    Holds,
    Index,
    Linear,
    Some,
    Truth,
    Value,
    negation,
    size_of,
)


@dataclass(frozen=True)
class Laid:
    """A tensor whose element at ``index`` is wanted."""

    node: fx.Node
    index: Index


@dataclass(frozen=True)
class Whole:
    """A tensor as it is, broadcast from the right against scores with these axes; ``None`` is batch and head in one."""

    node: fx.Node
    axes: tuple[str | None, ...]


@dataclass(frozen=True)
class Written:
    """An operator on other recipes, and on further constants."""

    op: str
    parts: tuple[Recipe, ...]
    constants: tuple[Any, ...] = ()


Recipe = Laid | Whole | Written


def find(elements: Elements, value: Value, wanted: Sequence[str]) -> Recipe | None:
    """How to come by a tensor of a value, laid out on the wanted axes or broadcastable to them.

    Args:
        elements: what was read so far.
        value: of each element.
        wanted: names of the axes.
    """
    places = [Laid(node, index) for node, index in elements.places.get(value, ())]
    if isinstance(value, Element):
        places.append(Laid(value.node, value.index))
    costs = [(_steps(elements, place, wanted), place) for place in places]
    possible = [(steps, place) for steps, place in costs if steps is not None]
    if possible:
        return min(possible, key=lambda item: item[0])[1]
    return _composed(elements, value, wanted) if isinstance(value, Truth) else None


def _composed(elements: Elements, truth: Truth, wanted: Sequence[str]) -> Recipe | None:
    if isinstance(truth, Holds) and truth.wanted:
        tensor = find(elements, truth.element, wanted)
        is_bool = fake_of(truth.element.node).dtype == torch.bool
        return tensor if tensor is None or is_bool else Written("aten.ne.Scalar", (tensor,), (0,))
    if isinstance(truth, Holds) or _is_found(elements, negation(truth), wanted):
        contrary = find(elements, negation(truth), wanted)
        return None if contrary is None else Written("aten.logical_not", (contrary,))
    if not isinstance(truth, Every | Some):
        return None
    found: Recipe | None = None
    for part in sorted(truth.parts, key=str):
        recipe = find(elements, part, wanted)
        if recipe is None:
            return None
        name = "aten.logical_and" if isinstance(truth, Every) else "aten.logical_or"
        found = recipe if found is None else Written(name, (found, recipe))
    return found


def _is_found(elements: Elements, truth: Truth, wanted: Sequence[str]) -> bool:
    places = (Laid(node, index) for node, index in elements.places.get(truth, ()))
    return any(_steps(elements, place, wanted) is not None for place in places)


def _names(elements: Elements, place: Laid) -> list[str | None] | None:
    """The index along each axis, ``None`` for an axis read at one place; ``None`` if that is not all there is to it."""
    found: list[str | None] = []
    for size, entry in zip(fake_of(place.node).shape, place.index, strict=True):
        if entry.is_constant and entry.constant >= 0:
            found.append(None)
            continue
        ((name, _),) = entry.terms if len(entry.terms) == 1 else (("", 0),)
        if entry != Linear(((name, 1),)) or elements.ranges.get(name) != size_of(size) or name in found:
            return None
        found.append(name)
    return found


def _is_aligned(place: Laid, names: Sequence[str | None], wanted: Sequence[str]) -> bool:
    """Whether broadcasting from the right does it."""
    if len(names) > len(wanted):
        return False
    tail = wanted[len(wanted) - len(names) :]
    sizes = fake_of(place.node).shape
    return all(
        name == axis or (name is None and isinstance(size, int) and size == 1)
        for name, axis, size in zip(names, tail, sizes, strict=True)
    )


def _steps(elements: Elements, place: Laid, wanted: Sequence[str]) -> int | None:
    """How many views it takes to lay a tensor out; ``None`` if views cannot."""
    names = _names(elements, place)
    if names is None or any(name is not None and name not in wanted for name in names):
        return None
    if wanted[-1] not in names and len(wanted) == 2:
        return None  # a key mask must run over the keys
    if _is_aligned(place, names, wanted):
        return len(wanted) - len(names)
    kept = [name for name in names if name is not None]
    in_order = kept == [axis for axis in wanted if axis in kept]
    return len(names) - len(kept) + (not in_order) + len(wanted) - len(kept)


def shared_call(rewriter: Rewriter, target: str, *args: Any, like: fx.Node) -> fx.Node:
    """A call, or the equal one that already stands before ``like``."""
    function = resolve_target(target)
    wanted, _ = canonical_call(function, args, {})
    source: fx.Node = args[0]
    for user in source.users:
        if user.target is function and user.args == wanted and not user.kwargs and user < like:
            return user
    return rewriter.call(target, *args, like=like)


class Maker:
    """Makes the tensors of recipes.

    Args:
        rewriter: the edit they are made in.
        elements: what the recipes were found with.
        wanted: names of the axes.
        heads: how many heads are folded into the batch where they are.
        like: the node whose provenance new ones inherit, and before which they are needed.
    """

    def __init__(
        self, rewriter: Rewriter, elements: Elements, wanted: Sequence[str], heads: int, like: fx.Node
    ) -> None:
        self.rewriter, self.elements, self.wanted, self.heads, self.like = rewriter, elements, wanted, heads, like

    def make(self, recipe: Recipe) -> fx.Node:
        """The node of a recipe, of as many dimensions as there are wanted axes."""
        if isinstance(recipe, Laid):
            return self._laid_out(recipe)
        if isinstance(recipe, Whole):
            return self._unfolded(recipe)
        return self._call(recipe.op, *(self.make(part) for part in recipe.parts), *recipe.constants)

    def _call(self, target: str, *args: Any) -> fx.Node:
        return shared_call(self.rewriter, target, *args, like=self.like)

    def _laid_out(self, place: Laid) -> fx.Node:
        names = _names(self.elements, place)
        assert names is not None
        node, sizes = place.node, fake_of(place.node).shape
        if _is_aligned(place, names, self.wanted):
            return self._padded(node)
        for axis in reversed(range(len(names))):
            if names[axis] is None and isinstance(sizes[axis], int) and sizes[axis] == 1:
                node = self._call("aten.squeeze.dim", node, axis)
            elif names[axis] is None:
                node = self._call("aten.select.int", node, axis, place.index[axis].constant)
        kept = [name for name in names if name is not None]
        order = [kept.index(axis) for axis in self.wanted if axis in kept]
        if order != sorted(order):
            node = self._call("aten.permute", node, order)
        for position, name in enumerate(self.wanted):
            if name not in kept:
                node = self._call("aten.unsqueeze", node, position)
        return node

    def _unfolded(self, recipe: Whole) -> fx.Node:
        node, shape = recipe.node, fake_of(recipe.node).shape
        if len(recipe.axes) == 3 and len(shape) == 3:
            if recipe.axes[0] is not None:
                return self._call("aten.unsqueeze", node, 1)
            if not (isinstance(shape[0], int) and shape[0] == 1):
                return self._call("aten.unflatten.int", node, 0, [-1, self.heads])
        return self._padded(node)

    def _padded(self, node: fx.Node) -> fx.Node:
        for _ in range(len(self.wanted) - fake_of(node).dim()):
            node = self._call("aten.unsqueeze", node, 0)
        return node
