"""Where the features of a value lie in the values that it is made of.

A *layout* says of every element of a value which feature of a later value it becomes: an int64 tensor of the value's
rank, 1 wide where nothing depends on the position (batch, sequence), with -1 for elements that become no feature. The
functions here carry a layout backwards, from what an operator gives to what it reads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

Shape = Sequence[int | str]


def of_features(shape: Shape) -> torch.Tensor:
    """The layout of the value itself, ``[..., features]``."""
    width = shape[-1]
    assert isinstance(width, int)
    return torch.arange(width).reshape(*[1] * (len(shape) - 1), width)


def regrouped(layout: torch.Tensor, given: Shape, read: Shape) -> torch.Tensor | None:
    """Through a view: the layout of what is read, ``None`` where features mix with sizes that vary."""
    sizes: list[int] = []
    opened: list[int] = []
    for left, right in segments(given, read):
        if all(layout.shape[place] == 1 for place in left):
            opened += [1] * len(left)
            sizes += [1] * len(right)
            continue
        here, there = [given[place] for place in left], [read[place] for place in right]
        if any(isinstance(size, str) for size in (*here, *there)):
            if len(here) == len(there) == 1 and here == there:  # pragma: no cover - a varying size holds no feature
                return None
            return None
        opened += [int(size) for size in here]
        sizes += [int(size) for size in there]
    return layout.expand(opened).reshape(sizes)


def segments(left: Shape, right: Shape) -> list[tuple[range, range]]:
    """The two shapes cut into the shortest stretches of equal size."""
    found: list[tuple[range, range]] = []
    start = other = 0
    while start < len(left) or other < len(right):
        room = [(a, b) for a in range(start, len(left) + 1) for b in range(other, len(right) + 1)]
        steps = sorted(room, key=lambda ends: (ends[0] + ends[1], ends[0]))
        for end, stop in steps[1:]:
            if _size(left[start:end]) == _size(right[other:stop]):
                found.append((range(start, end), range(other, stop)))
                start, other = end, stop
                break
        else:
            return [(range(len(left)), range(len(right)))]
    return found


def _size(shape: Shape) -> tuple[int, list[str]]:
    """A product of sizes: the number in it and the rest, sorted."""
    number, names = 1, []
    for size in shape:
        for part in (str(size),) if isinstance(size, int) or set(str(size)) & set("+-/(") else str(size).split("*"):
            if part.strip().isdigit():
                number *= int(part)
            else:
                names.append(part.strip())
    return number, sorted(names)


def unexpanded(layout: torch.Tensor, read: Shape, ties: list[torch.Tensor]) -> torch.Tensor:
    """Through an expansion: copies of one element must have one factor; those go to ``ties`` as ``[n, copies]``."""
    while layout.dim() > len(read):
        layout = _first_of(layout, 0, ties).squeeze(0)
    for place, size in enumerate(read):
        if size == 1 and layout.shape[place] > 1:
            layout = _first_of(layout, place, ties)
    return layout


def of_value_heads(layout: torch.Tensor, heads: int, ties: list[torch.Tensor]) -> torch.Tensor:
    """From what attention gives, ``[1, query heads, 1, width]``, to its values, ``[1, heads, 1, width]``."""
    copies = layout.shape[1] // heads
    split = layout.reshape(layout.shape[0], heads, copies, *layout.shape[2:])
    return _first_of(split, 2, ties).squeeze(2)


def _first_of(layout: torch.Tensor, place: int, ties: list[torch.Tensor]) -> torch.Tensor:
    if layout.shape[place] > 1:
        together = layout.movedim(place, -1).reshape(-1, layout.shape[place])
        ties.append(together[(together >= 0).all(-1)])
    return layout.narrow(place, 0, 1)


def placed(layout: torch.Tensor, place: int, start: int, width: int) -> torch.Tensor:
    """From a slice along a dimension to the whole of that width; the rest becomes no feature."""
    sizes = list(layout.shape)
    if sizes[place] == 1 and width > 1 and int(layout.max()) < 0:
        return layout
    sizes[place] = width
    whole = torch.full(sizes, -1, dtype=torch.int64)
    whole.narrow(place, start, layout.shape[place]).copy_(layout)
    return whole


def representatives(features: int, ties: Sequence[torch.Tensor]) -> torch.Tensor:
    """For every feature the first of those that must have the same factor, ``[features]``."""
    first = torch.arange(features)
    for together in ties:
        first[together] = first[together[:, :1]].expand_as(together)
    for _ in range(len(ties)):
        first = first[first]
    return first
