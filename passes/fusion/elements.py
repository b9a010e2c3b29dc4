"""What one element of a tensor is, found by reading the operators that made it backwards from an index.

``Elements(program, sizes).at(node, index)`` follows views, index arithmetic, comparisons, logic and the like. Where it
meets anything else, or anything it cannot be sure of, it stops at an :class:`Element`, so what it says is sound.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from graphwright.ir.arguments import arguments_of
from graphwright.ir.names import op_name
from graphwright.ir.program import Program
from graphwright.ir.types import VAL, fake_of, is_tensor
from graphwright.passes.fusion import movements, operations
from graphwright.passes.fusion.calculation import constant
from graphwright.passes.fusion.symbolic import (
    AtLeastZero,
    Element,
    Every,
    Handler,
    Index,
    Known,
    Linear,
    Some,
    Truth,
    Value,
    every,
    size_of,
    some,
)

_HANDLERS: dict[str, Handler] = {**movements.HANDLERS, **operations.HANDLERS}


class Elements:
    """Elements of a program's tensors as symbolic values.

    Args:
        program: only read.
        ranges: the indices that may be used, each with the size that it stays below.
        binary_inputs: take inputs of integers that are calculated with for zeros and ones.

    Attributes:
        places: every value found so far, with the nodes and indices at which it stands.
        assumed: whether an input was taken for zeros and ones.
    """

    _memo: dict[tuple[fx.Node, Index], Value]

    def __init__(self, program: Program, ranges: Mapping[str, Linear], *, binary_inputs: bool = False) -> None:
        self.program = program
        self.ranges = dict(ranges)
        self.binary_inputs = binary_inputs
        self.places: dict[Value, list[tuple[fx.Node, Index]]] = {}
        self.assumed = False
        self._memo = {}

    def at(self, value: Any, index: Index) -> Value:
        """The element of a node's tensor at an index, or a number as a value."""
        if not isinstance(value, fx.Node):
            return constant(value)
        if not is_tensor(value):
            size = value.meta.get(VAL)
            return size_of(size) if isinstance(size, int | torch.SymInt) else Element(value, index)
        key = (value, index)
        if key not in self._memo:
            found = self._evaluate(value, index)
            found = Element(value, index) if found is None else found
            self._memo[key] = found
            self.places.setdefault(found, []).append(key)
        return self._memo[key]

    def broadcast(self, value: Any, node: fx.Node, index: Index) -> Value | None:
        """An operand's element where the result is at ``index``; ``None`` when it is not plain how it is broadcast."""
        if not isinstance(value, fx.Node) or not is_tensor(value):
            return self.at(value, ())
        own, result = fake_of(value).shape, fake_of(node).shape
        skipped = len(result) - len(own)
        found: list[Linear] = []
        for axis, size in enumerate(own):
            if isinstance(size, int) and size == 1:
                found.append(Linear())
            elif size_of(size) == size_of(result[axis + skipped]):
                found.append(index[axis + skipped])
            else:
                return None
        return self.at(value, tuple(found))

    def is_at_least_zero(self, form: Linear) -> bool:
        """Whether a form is never negative, whatever the indices and sizes."""
        lowest = Linear((), form.constant)
        for name, coefficient in form.terms:
            if name not in self.ranges:
                lowest += Linear(((name, coefficient),))
            elif coefficient < 0:
                lowest += (self.ranges[name] - 1) * coefficient
        # What is left are sizes; those of dimensions are at least one.
        if any(coefficient < 0 or not name.startswith("#") for name, coefficient in lowest.terms):
            return False
        return lowest.constant + sum(coefficient for _, coefficient in lowest.terms) >= 0

    def simplified(self, truth: Truth) -> Truth:
        """The truth without the conditions that always hold."""
        if isinstance(truth, Every):
            return every(*map(self.simplified, truth.parts))
        if isinstance(truth, Some):
            return some(*map(self.simplified, truth.parts))
        if not isinstance(truth, AtLeastZero):
            return truth
        if self.is_at_least_zero(truth.form):
            return Known(True)
        return Known(False) if self.is_at_least_zero(truth.form * -1 - 1) else truth

    @property
    def read(self) -> tuple[tuple[fx.Node, Index], ...]:
        """Every node that was read, and where."""
        return tuple(self._memo)

    # -- operators -------------------------------------------------------------------------------------------------

    def _evaluate(self, node: fx.Node, index: Index) -> Value | None:
        if node.op == "get_attr":
            return operations.stored(self, node, index)
        if node.op != "call_function":
            return None
        name = op_name(node)
        arguments = arguments_of(node)
        handler = _HANDLERS.get(name) or _HANDLERS.get(name.split(".")[1])
        return handler(self, node, arguments, index) if handler is not None else None
