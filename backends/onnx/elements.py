"""Lazily shaped tensors: one run of elements under as many shapes as its readers need.

In a traced transformer most nodes only reshape. Emitting them one by one gives graphs in which runtimes see through
little; here a view shares the elements of its source, and a Reshape appears only where an operator needs a shape
nobody has asked for yet. So a linear's ``[rows, N]`` result flows through bias, normalisation and activation as it is.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from graphwright.backends.onnx.graph import GraphBuilder
from graphwright.backends.onnx.sizes import Sizes, SizeTable, product


class Elements:
    """Elements in row-major order.

    Attributes:
        swapped: for elements of shape ``[B, H, S, D]``, the elements of the same tensor as ``[B, S, H, D]``, when they
            exist or are cheaper: attention kernels take and give heads side by side in the last dimension.
    """

    def __init__(
        self,
        graph: GraphBuilder,
        sizes: SizeTable,
        *,
        make: Callable[[], tuple[Sizes, ir.Value]] | None = None,
        swapped: Elements | None = None,
    ) -> None:
        self._graph = graph
        self._sizes = sizes
        self._make = make
        self._forms: dict[Sizes, ir.Value] = {}
        self.swapped = swapped

    @classmethod
    def of(cls, graph: GraphBuilder, sizes: SizeTable, shape: Sizes, value: ir.Value) -> Elements:
        """Elements that exist in one shape."""
        elements = cls(graph, sizes)
        elements._forms[shape] = value
        return elements

    def has(self, shape: Sizes) -> bool:
        """Whether a value of this shape exists already."""
        return shape in self._forms

    @property
    def is_made(self) -> bool:
        """Whether the elements exist in any shape."""
        return bool(self._forms)

    def add(self, shape: Sizes, value: ir.Value) -> None:
        """Note a further value that holds these elements."""
        self._forms.setdefault(shape, value)

    def get(self, shape: Sizes) -> ir.Value:
        """The elements in this shape."""
        if not self._forms:
            assert self._make is not None
            made, value = self._make()
            self._forms[made] = value
        if shape not in self._forms:
            source = min(self._forms, key=lambda each: self._cost(each, shape))
            self._forms[shape] = self._reshape(self._forms[source], source, shape)
        return self._forms[shape]

    def _cost(self, source: Sizes, target: Sizes) -> tuple[bool, int]:
        return self._template(source, target) is None, len(source)

    def _reshape(self, value: ir.Value, source: Sizes, target: Sizes) -> ir.Value:
        new_axes = _inserted_ones(source, target)
        if new_axes:
            return self._graph.call("Unsqueeze", value, self._graph.integers(*new_axes))
        old_axes = _inserted_ones(target, source)
        if old_axes:
            return self._graph.call("Squeeze", value, self._graph.integers(*old_axes))
        template = self._template(source, target)
        shape = self._sizes.vector(target) if template is None else self._graph.integers(*template)
        return self._graph.call("Reshape", value, shape, allowzero=1 if 0 in target else None)

    @staticmethod
    def _template(source: Sizes, target: Sizes) -> list[int] | None:
        """A constant operand for Reshape (0 copies a dimension, -1 is inferred), or ``None`` if there is none."""
        template: list[int] = []
        for axis, size in enumerate(target):
            if isinstance(size, int):
                if size == 0:
                    return None
                template.append(size)
            elif axis < len(source) and source[axis] == size:
                template.append(0)
            elif -1 in template:
                return None
            else:
                template.append(-1)
        return template


def _inserted_ones(source: Sizes, target: Sizes) -> list[int]:
    """Axes of ``target`` that are 1 and whose removal gives ``source``; empty when it is not so."""
    if len(target) <= len(source):
        return []
    axes: list[int] = []
    position = 0
    for axis, size in enumerate(target):
        if position < len(source) and source[position] == size:
            position += 1
        elif size == 1:
            axes.append(axis)
        else:
            return []
    return axes if position == len(source) else []


def rows_of(shape: Sizes) -> Sizes | None:
    """The shape with all but the last dimension folded into one; ``None`` when the last is not a number."""
    if not shape or not isinstance(shape[-1], int):
        return None
    return (product(shape[:-1]), shape[-1])
