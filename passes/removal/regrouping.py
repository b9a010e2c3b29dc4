"""Units through views: dimensions that become one, or one that becomes several."""

from __future__ import annotations

import math

import torch
from torch import fx

from graphwright.passes.quantization.equivalence.features import segments
from graphwright.passes.removal.units import Axis, Units


def regroup(units: Units, node: fx.Node) -> set[Axis]:
    """Link the dimensions of a view with those of what it is a view of.

    Where several dimensions lie in one, as heads and their features do, units may lie along one of the several only:
    the one along which something is known, or the last of those in front whose elements can be told apart. Then all
    that it holds belongs to it.
    """
    source = node.all_input_nodes[0]
    covered: set[Axis] = set()
    for read, given in segments(units.shape(source), units.shape(node)):
        here = [units.axis(source, place) for place in read]
        there = [units.axis(node, place) for place in given]
        covered |= _segment(units, here, there)
    return covered


def _segment(units: Units, here: list[Axis], there: list[Axis]) -> set[Axis]:
    sizes = [units.shape(axis.node)[axis.place] for axis in (*here, *there)]
    known = {axis for axis in (*here, *there) if units.has(axis)}
    if not known or any(not isinstance(size, int) for size in sizes):
        return set()
    here, there = ([axis for axis in side if units.size(axis) > 1] for side in (here, there))
    if len(here) == len(there) == 1:
        units.link(here[0], there[0])
        return {*here, *there}
    if len(here) == 1:
        return _apart(units, here[0], there)
    return _apart(units, there[0], here) if len(there) == 1 else set()


def _apart(units: Units, flat: Axis, parts: list[Axis]) -> set[Axis]:
    """One dimension on the one side, several on the other."""
    sizes = [units.size(axis) for axis in parts]
    along = [index for index, axis in enumerate(parts) if units.has(axis)]
    if len(along) > 1:
        return set()
    chosen = along[0] if along else _told_apart(units.of(flat).reshape(sizes))
    here = torch.arange(math.prod(sizes))
    there = torch.arange(sizes[chosen]).reshape([size if index == chosen else 1 for index, size in enumerate(sizes)])
    units.link(flat, parts[chosen], here, there.expand(sizes).flatten())
    return {flat, parts[chosen]}


def _told_apart(labels: torch.Tensor) -> int:
    """The dimension along which units differ, of several that lie in one; the first where they differ along more."""
    for index in reversed(range(labels.dim())):
        if bool(
            (
                labels
                == labels.movedim(index, 0)
                .reshape(labels.shape[index], -1)[:, 0]
                .reshape([size if place == index else 1 for place, size in enumerate(labels.shape)])
            ).all()
        ):
            return index
    return 0
