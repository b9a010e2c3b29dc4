"""Types of values: dtype plus a shape whose sizes are numbers or expressions over named dimensions.

A Program owns one :class:`SymbolTable`. Every node's ``meta["val"]`` is a fake tensor (or symbolic integer) made in its
fake mode, so that the type of a new node is computed by running its operator on fakes, exactly as torch would.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from graphwright.ir.errors import ProgramError, TypeMismatch

if TYPE_CHECKING:
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    from graphwright.ir.symbols import Symbols

VAL = "val"
# The type that a program's text declares for a value, where types were not inferred.
DECLARED = "declared"

DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "bool",
    torch.complex64: "c64",
}
DTYPES_BY_NAME: dict[str, torch.dtype] = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class Dim:
    """A named dimension that varies from call to call.

    Attributes:
        name: how it is written in types (``batch``).
        min: smallest size the program accepts.
        max: largest size, or ``None`` without a limit.
        hint: the size it had when the model was traced.
    """

    name: str
    min: int = 1
    max: int | None = None
    hint: int = 2

    def admits(self, size: int) -> bool:
        """Whether a call may have this size."""
        return self.min <= size and (self.max is None or size <= self.max)


@dataclass(frozen=True)
class TensorType:
    """dtype and shape of a tensor value; sizes are ints or expressions over dimension names (``2*batch``)."""

    dtype: torch.dtype
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{DTYPE_NAMES.get(self.dtype, str(self.dtype))}[{', '.join(str(size) for size in self.shape)}]"


@dataclass(frozen=True)
class ScalarType:
    """A number computed in the graph, such as the size of a dimension; ``expression`` is its symbolic value."""

    kind: str
    expression: str

    def __str__(self) -> str:
        return f"{self.kind}({self.expression})"


@dataclass(frozen=True)
class TupleType:
    """Several values, taken apart by ``getitem``."""

    items: tuple[ValueType | None, ...]

    def __str__(self) -> str:
        return f"({', '.join(str(item) for item in self.items)})"


ValueType = TensorType | ScalarType | TupleType


class SymbolTable:
    """The named dimensions of one program and the fake mode in which its types are computed.

    Attributes:
        dims: the dimensions by name.
        conditions: what their sizes must satisfy together, see :mod:`graphwright.ir.conditions`.
    """

    def __init__(self, dims: Mapping[str, Dim], conditions: Sequence[str] = ()) -> None:
        self.dims = dict(dims)
        self.conditions = tuple(conditions)

    @cached_property
    def _symbols(self) -> Symbols:
        # Not before a type is computed: a program that is only run needs none, and torch's machinery for it is large.
        from graphwright.ir.symbols import Symbols

        return Symbols(self.dims)

    @property
    def shape_env(self) -> ShapeEnv:
        """torch's record of the symbols."""
        return self._symbols.shape_env

    @property
    def mode(self) -> FakeTensorMode:
        """In which fake values are made."""
        return self._symbols.mode

    def size(self, expression: int | str) -> int | torch.SymInt:
        """The (symbolic) integer for a size as written in a type; input types use plain dimension names only."""
        if isinstance(expression, int):
            return expression
        if expression not in self._symbols.sizes:
            raise ProgramError(
                f"unknown dimension {expression!r}",
                hint=f"the program declares {', '.join(self.dims) or 'no dimensions'}",
            )
        return self._symbols.sizes[expression]

    def fake(self, kind: TensorType, strides: tuple[int, ...] | None = None) -> torch.Tensor:
        """A fake tensor of this type, contiguous unless strides are given."""
        with self.mode:
            sizes = cast(tuple[int, ...], tuple(self.size(size) for size in kind.shape))
            if strides is not None:
                return torch.empty_strided(sizes, strides, dtype=kind.dtype)
            return torch.empty(sizes, dtype=kind.dtype)

    def fake_weight(self, tensor: torch.Tensor) -> torch.Tensor:
        """A fake stand-in for a weight; holds no reference to it."""
        # Weights without values (a program parsed without them) are typed like those on the CPU, where inputs are.
        device = torch.device("cpu") if tensor.is_meta else tensor.device
        with self.mode:
            fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
        return fake

    def render(self, size: int | torch.SymInt) -> int | str:
        """A size as it is written in a type."""
        if isinstance(size, int):
            return size
        expression = size.node.expr
        if expression.is_number:
            return int(expression)
        return re.sub(
            r"\b[suz]+\d+\b", lambda found: self._symbols.names.get(found.group(), found.group()), str(expression)
        )

    def concrete(self, size: int | torch.SymInt, sizes: Mapping[str, int]) -> int | None:
        """A size when every dimension has the given one; ``None`` if it depends on values."""
        if isinstance(size, int):
            return size
        expression = size.node.expr
        names = {symbol: self._symbols.names.get(str(symbol)) for symbol in expression.free_symbols}
        if any(name not in sizes for name in names.values()):
            return None
        return int(expression.subs({symbol: sizes[str(name)] for symbol, name in names.items()}))

    def type_of_value(self, value: Any) -> ValueType | None:
        """The type of a fake value, ``None`` for constants."""
        if isinstance(value, torch.Tensor):
            return TensorType(value.dtype, tuple(self.render(size) for size in value.shape))
        if isinstance(value, torch.SymInt):
            return ScalarType("int", str(self.render(value)))
        if isinstance(value, bool | torch.SymBool):
            return ScalarType("bool", str(value) if isinstance(value, bool) else self._rename(str(value.node.expr)))
        if isinstance(value, int):
            return ScalarType("int", str(value))
        if isinstance(value, float | torch.SymFloat):
            return ScalarType("float", str(value) if isinstance(value, float) else self._rename(str(value.node.expr)))
        if isinstance(value, tuple | list):
            return TupleType(tuple(self.type_of_value(item) for item in value))
        return None

    def _rename(self, text: str) -> str:
        return re.sub(r"\b[suz]+\d+\b", lambda found: self._symbols.names.get(found.group(), found.group()), text)

    def infer(self, node: fx.Node, tensor_of: Callable[[str], torch.Tensor]) -> Any:
        """Compute and record the fake value of one node from those of its inputs.

        Args:
            node: a ``get_attr`` or ``call_function`` node; placeholders keep what they have.
            tensor_of: the weight behind a ``get_attr`` target.

        Raises:
            TypeMismatch: the operator does not accept values of these types.
        """
        if node.op == "get_attr":
            node.meta[VAL] = self.fake_weight(tensor_of(str(node.target)))
        elif node.op == "call_function":
            args: Any = fx.node.map_arg(node.args, lambda source: source.meta[VAL])
            kwargs: Any = fx.node.map_arg(node.kwargs, lambda source: source.meta[VAL])
            try:
                # The python dispatcher takes apart composites (lstm, ...) whose C++ form needs concrete sizes.
                with self.mode, torch.no_grad(), enable_python_dispatcher():
                    node.meta[VAL] = cast(Callable[..., Any], node.target)(*args, **kwargs)
            except Exception as error:  # torch reports a wrong operand by many exception types
                reason = str(error).strip().splitlines()
                raise TypeMismatch(
                    f"{node.target} does not accept these operands: {reason[0] if reason else type(error).__name__}",
                    where=f"%{node.name}",
                    context=[
                        f"%{source.name} : {self.type_of_value(source.meta[VAL])}" for source in node.all_input_nodes
                    ],
                ) from error
        return node.meta.get(VAL)


def is_tensor(node: fx.Node) -> bool:
    """Whether the node's value is one tensor."""
    return isinstance(node.meta.get(VAL), torch.Tensor)


def fake_of(node: fx.Node) -> FakeTensor:
    """The fake tensor of a node.

    Raises:
        ProgramError: the node is not a tensor, or has not been typed.
    """
    value = node.meta.get(VAL)
    if not isinstance(value, FakeTensor):
        raise ProgramError("the value is not a typed tensor", where=f"%{node.name}")
    return value
