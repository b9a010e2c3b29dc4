"""Which element of its operand a reshape puts at an index."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from graphwright.passes.fusion.symbolic import Linear


def source_index(
    before: Sequence[Any], after: Sequence[Any], index: Sequence[Linear], is_at_least_zero: Callable[[Linear], bool]
) -> tuple[Linear, ...] | None:
    """The index into a tensor of shape ``before`` of what stands at ``index`` once it has the shape ``after``.

    Elements keep their row-major order, so axes are merged and split group by group, where the products of sizes meet.

    Args:
        before: sizes of the operand.
        after: sizes of the result.
        index: into the result.
        is_at_least_zero: whether a form is never negative.

    Returns:
        ``None`` when a place cannot be divided by a size, or an inner size varies.
    """
    cuts = _cuts(before, after)
    if cuts is None:
        return None
    found: list[Linear] = []
    for (first, start), (last, end) in itertools.pairwise(cuts):
        offset = Linear()
        for axis in range(start, end):
            stride = after[axis] if axis > start else 1
            if not isinstance(stride, int):
                return None
            offset = offset * stride + index[axis]
        places: list[Linear] = []
        for axis in range(last - 1, first, -1):
            divided = _divided(offset, before[axis], is_at_least_zero)
            if divided is None:
                return None
            offset, place = divided
            places.append(place)
        if last > first:
            found += [offset, *reversed(places)]
    return tuple(found)


def _cuts(before: Sequence[Any], after: Sequence[Any]) -> list[tuple[int, int]] | None:
    """The numbers of leading axes of both shapes that hold equally many elements; ``None`` if the wholes differ."""
    left, right = _products(before), _products(after)
    if left[-1] != right[-1]:
        return None
    # Of axes of size 1, which change no product, all go to the front.
    ends = {product: place for place, product in enumerate(right)}
    places = {product: (place, ends[product]) for place, product in enumerate(left) if product in ends}
    return [(0, 0), *places.values()]


def _products(shape: Sequence[Any]) -> list[Any]:
    found: list[Any] = [1]
    for size in shape:
        product = found[-1] * (size.node.expr if isinstance(size, torch.SymInt) else size)
        found.append(product if isinstance(product, int) else product.expand())
    return found


def _divided(form: Linear, divisor: Any, is_at_least_zero: Callable[[Linear], bool]) -> tuple[Linear, Linear] | None:
    """Quotient and remainder of a form."""
    if not isinstance(divisor, int):
        return None
    whole = Linear(tuple((name, value // divisor) for name, value in form.terms if value % divisor == 0))
    rest = Linear(tuple((name, value) for name, value in form.terms if value % divisor))
    whole, rest = whole + form.constant // divisor, rest + form.constant % divisor
    inside = is_at_least_zero(rest) and is_at_least_zero(rest * -1 + (divisor - 1))
    return (whole, rest) if inside else None
