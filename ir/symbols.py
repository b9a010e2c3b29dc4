"""torch's symbols for the named dimensions of a program."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import torch
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils._sympy.value_ranges import ValueRanges

if TYPE_CHECKING:
    from graphwright.ir.types import Dim


class Symbols:
    """A symbol for each dimension, and the fake mode in which values have sizes made of them.

    Attributes:
        shape_env: torch's record of the symbols.
        mode: in which fake values are made.
        sizes: the symbolic integer of each dimension.
        names: the dimension of each symbol.
    """

    def __init__(self, dims: Mapping[str, Dim]) -> None:
        self.shape_env = ShapeEnv()
        self.mode = FakeTensorMode(shape_env=self.shape_env, allow_non_fake_inputs=True)
        self.sizes: dict[str, torch.SymInt] = {}
        self.names: dict[str, str] = {}
        hints: set[int] = set()
        for dim in dims.values():
            # Different hints keep ShapeEnv's duck typing from merging two dimensions that were traced equal.
            hint = max(dim.hint, 2)
            while hint in hints:
                hint += 1
            hints.add(hint)
            source = ConstantSource(dim.name)
            symbol = self.shape_env.create_symbol(
                hint, source=source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None
            )
            if dim.max is not None:
                self.shape_env.var_to_range[symbol] = ValueRanges(2, max(dim.max, 2))
            self.sizes[dim.name] = cast(
                torch.SymInt, self.shape_env.create_symintnode(symbol, hint=hint, source=source)
            )
            self.names[str(symbol)] = dim.name
