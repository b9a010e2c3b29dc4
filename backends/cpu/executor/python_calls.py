"""What the executor has no instruction for runs in PyTorch: a call back into Python."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from graphwright.ir.conditions import evaluate
from graphwright.ir.program import Program
from graphwright.ir.types import ScalarType, TensorType

Arrays = Sequence["np.ndarray[Any, Any] | None"]

# The sizes of the call that runs on this thread: they are arguments of some operators.
_sizes = threading.local()


def set_sizes(sizes: Mapping[str, int]) -> None:
    """Say what the sizes of this thread's next call are."""
    _sizes.now = sizes


def call_of(
    program: Program,
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    inputs: Sequence[fx.Node],
    results: Sequence[fx.Node | None],
) -> Callable[[Arrays], None]:
    """A function of the executor's arrays: those of ``inputs``, then those of ``results``, which it fills in.

    Args:
        program: where the nodes stand.
        function: what is called, an operator or a kernel.
        args, kwargs: what it is called with; may hold nodes.
        inputs: nodes among these whose values the executor has.
        results: the nodes of its value or values; ``None`` for one that nothing reads.
    """
    places = {each: index for index, each in enumerate(inputs)}
    dtypes = [_dtype(program, each) for each in inputs]
    wanted = [each is not None for each in results]

    # No nodes in what is kept: they lead to the program, which leads back to the executor that holds this.
    def prepared(argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            if argument in places:
                return _Place(places[argument])
            if argument.op == "get_attr":
                return program.tensor(argument)
            kind = program.type_of(argument)
            assert isinstance(kind, ScalarType)
            return _Size(kind.expression)
        return [prepared(each) for each in argument] if isinstance(argument, list | tuple) else argument

    positional, named = prepared(args), {name: prepared(each) for name, each in kwargs.items()}

    def call(arrays: Arrays) -> None:
        given = [_tensor(array, dtype) for array, dtype in zip(arrays, dtypes, strict=False)]
        with torch.no_grad():
            found = function(
                *_filled(positional, given), **{name: _filled(each, given) for name, each in named.items()}
            )
            several = found if isinstance(found, tuple | list) else (found,)
            for is_wanted, result, array in zip(wanted, several, arrays[len(dtypes) :], strict=True):
                if is_wanted and array is not None:
                    torch.from_numpy(array).copy_(result)

    return call


@dataclass(frozen=True)
class _Place:
    """One of the tensors that a call is given."""

    index: int


@dataclass(frozen=True)
class _Size:
    """A size of the call that runs."""

    expression: str


def _filled(argument: Any, tensors: Sequence[torch.Tensor]) -> Any:
    if isinstance(argument, _Place):
        return tensors[argument.index]
    if isinstance(argument, _Size):
        return evaluate(argument.expression, _sizes.now)
    return [_filled(each, tensors) for each in argument] if isinstance(argument, list) else argument


def _dtype(program: Program, node: fx.Node) -> torch.dtype:
    kind = program.type_of(node)
    assert isinstance(kind, TensorType)
    return kind.dtype


def _tensor(array: np.ndarray[Any, Any] | None, dtype: torch.dtype) -> torch.Tensor:
    assert array is not None
    return torch.from_numpy(array).to(dtype)
