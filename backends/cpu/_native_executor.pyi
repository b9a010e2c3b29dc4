# What `_native` has of the executor. There is no module of this name as the program runs: import these from `_native`.
from collections.abc import Callable, Sequence
from typing import Any

import numpy.typing as npt

class Instruction:
    """A kernel with its constants, which the executor calls on tensors."""

class LinearInstruction(Instruction):
    """What linears have in common for the executor.

    Attributes:
        activation: what the executor applies to the product: a name, or empty. It can only be set.
    """

    activation: str

class PythonCall(Instruction):
    """Calls a function with its operands as arrays, the outputs among them; absent ones are ``None``."""

    def __init__(self, function: Callable[[list[npt.NDArray[Any] | None]], None]) -> None: ...

class Arange(Instruction):
    """``y[i] = begin + i``, int64."""

    def __init__(self, begin: int) -> None: ...

class IntegerOperation(Instruction):
    """``add`` or ``mul`` of two int64 tensors, or of one and a number.

    Raises:
        ValueError: there is no such operation.
    """

    def __init__(self, name: str, number: int = 0) -> None: ...

class SelectRows(Instruction):
    """``y[b, k] = x[b, rows[b, k]]``."""

    def __init__(self) -> None: ...

class Where(Instruction):
    """``y = condition ? a : b``, float32; operands broadcast."""

    def __init__(self) -> None: ...

class Executor:
    """A program as instructions on values.

    Values are numbers, a negative one is absent; sizes are instructions of a stack machine (``csrc/plan.h``).
    The dtypes are ``float32``, ``bfloat16``, ``int8``, ``int64``, ``bool`` and ``uint8``.

    Raises:
        ValueError: there is no such value or dtype, or a tensor has more than six axes.
    """

    def __init__(self, symbols: int) -> None: ...
    def input(self, element: str, shape: Sequence[Sequence[int]]) -> int:
        """A value that every call gives."""
    def bound(self, element: str, shape: Sequence[Sequence[int]]) -> int:
        """A value that a runner is bound to."""
    def constant(self, array: npt.NDArray[Any]) -> int: ...
    def buffer(self, element: str, shape: Sequence[Sequence[int]]) -> int:
        """A value that the next instruction writes."""
    def reshape(self, base: int, shape: Sequence[Sequence[int]]) -> int: ...
    def permute(self, base: int, axes: Sequence[int]) -> int: ...
    def narrow(self, base: int, axis: int, begin: Sequence[int], length: Sequence[int]) -> int: ...
    def add_step(self, instruction: Instruction, operands: Sequence[int], inputs: int) -> None:
        """The first ``inputs`` operands are read, the others written."""
    def output(self, value: int) -> None: ...
    @property
    def steps(self) -> int:
        """How many instructions there are."""

class Cancelled(Exception):
    """A call was ended by :meth:`Runner.cancel`."""

class Runner:
    """Memory and plans for calls of an executor, one at a time."""

    def __init__(self, executor: Executor) -> None: ...
    def bind(self, value: int, array: npt.NDArray[Any]) -> None: ...
    def run(self, inputs: Sequence[npt.NDArray[Any]], threads: int) -> list[npt.NDArray[Any]]:
        """The outputs: arrays that the next call overwrites.

        Raises:
            ValueError: inputs do not fit, or an instruction cannot use their values.
            Cancelled: :meth:`cancel` was called meanwhile.
        """
    def profile(self, inputs: Sequence[npt.NDArray[Any]], threads: int) -> list[int]:
        """Run, and give the nanoseconds of each instruction."""
    def cancel(self) -> None:
        """End a call that is running; it raises :class:`Cancelled`."""
    @property
    def arena_bytes(self) -> int:
        """Bytes of the memory for activations."""
    @property
    def plans(self) -> int:
        """Sizes that memory is planned for."""
