"""What a kernel is to the lowering: a module, the arguments it takes as it runs, and its name for ``explain()``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import fx, nn

from graphwright.ir.arguments import arguments_of
from graphwright.ir.program import Program

T = TypeVar("T")
K = TypeVar("K", bound="Kernel")


Shape = tuple[int | str, ...]


@dataclass(frozen=True)
class Step:
    """An instruction of the executor and its operands.

    Attributes:
        instruction: of ``_native``.
        inputs: places among the kernel's inputs of its operands in order; ``None`` for one that is absent.
        outputs: how many operands it writes.
    """

    instruction: Any
    inputs: tuple[int | None, ...]
    outputs: int = 1

    def order(self, inputs: Sequence[T]) -> list[T | None]:
        """The operands among a call's inputs."""
        return [None if place is None or place >= len(inputs) else inputs[place] for place in self.inputs]


class Kernel(nn.Module):
    """A C++ kernel in place of a node. It holds what was known at lowering and gives no gradients.

    Attributes:
        inputs: names of the operator's arguments that it is called with, in order; one that the node leaves out or
            gives as a number is passed as it is.
        label: what ``explain()`` calls it: kernel, instruction set and what it rounds.
        given: the arguments it was made with, by name; packed files keep them. Only tensors, numbers, text, ``None``,
            tuples of these, and the dataclasses of packed operands.
        settings: names of attributes that the lowering sets afterwards.
    """

    inputs: tuple[str, ...]
    label: str
    given: dict[str, Any]
    settings: tuple[str, ...] = ()

    def __call__(self, *inputs: Any) -> Any:
        """``forward``, without the hooks that modules look for: they take as long as a small kernel."""
        return self.forward(*inputs)

    def step(self, inputs: Sequence[Shape | None], result: Shape) -> Step | None:
        """What the executor runs in its place, or ``None``: then it calls this from Python.

        Args:
            inputs: shapes of what it is called with, ``None`` for what is no tensor.
            result: shape of the first value it gives.
        """
        return None

    def __new__(cls: type[K], *args: Any, **kwargs: Any) -> K:
        """Note the arguments."""
        made = super().__new__(cls)
        given = inspect.signature(cls.__init__).bind(made, *args, **kwargs).arguments
        object.__setattr__(made, "given", {name: value for name, value in given.items() if name != "self"})
        return made


@dataclass(frozen=True)
class Site:
    """A node that may get a kernel.

    Attributes:
        program: where it stands.
        node: the call.
        isa: instruction set whose kernels are used.
        compute: ``CpuBackend``'s choice for linears.
        packed: what :meth:`packed_once` made for earlier nodes of the program.
    """

    program: Program
    node: fx.Node
    isa: str
    compute: str
    packed: dict[tuple[str, ...], Any] = field(default_factory=dict)

    @cached_property
    def arguments(self) -> dict[str, Any]:
        """The node's arguments by name; defaults are filled in."""
        return arguments_of(self.node)

    def is_stored(self, name: str) -> bool:
        """Whether an argument is a parameter or buffer of the program, and so known now."""
        value = self.arguments[name]
        return isinstance(value, fx.Node) and value.op == "get_attr"

    def stored(self, name: str) -> torch.Tensor:
        """The tensor of an argument for which :meth:`is_stored` holds."""
        return self.program.tensor(self.arguments[name])

    def maybe_stored(self, name: str) -> torch.Tensor | None:
        """Like :meth:`stored`, and ``None`` for an argument that is ``None``."""
        return None if self.arguments[name] is None else self.stored(name)

    def packed_once(self, names: tuple[str, ...], pack: Callable[[], T]) -> T:
        """What ``pack`` makes of stored arguments; where another node has the very same ones, what it made for that."""
        values = [self.arguments[name] for name in names]
        key = (str(self.node.target), *(str(v.target) if isinstance(v, fx.Node) else str(v) for v in values))
        if key not in self.packed:
            self.packed[key] = pack()
        found: T = self.packed[key]
        return found

    def value(self, name: str) -> torch.Tensor:
        """The fake tensor of an argument: its shape (sizes may be symbols) and dtype."""
        value: torch.Tensor = self.arguments[name].meta["val"]
        return value


# The kernel of a node, or why it has none; ``None`` where nothing is lost without, such as for sums of sizes.
Lowering = Callable[[Site], Kernel | str | None]


def floats(x: torch.Tensor) -> npt.NDArray[np.float32]:
    """A floating CPU tensor's values as float32 with whatever strides it has; a view where it is float32 already."""
    plain = x.detach() if x.requires_grad else x
    # numpy's views cost a fraction of torch's, and one row of a small layer takes only a few microseconds.
    values: npt.NDArray[np.float32] = (plain if x.dtype == torch.float32 else plain.to(torch.float32)).numpy()
    return values


def tensor_like(values: npt.NDArray[np.float32], x: torch.Tensor) -> torch.Tensor:
    """An array as a tensor of ``x``'s dtype."""
    result = torch.from_numpy(values)
    return result if x.dtype == torch.float32 else result.to(x.dtype)


def stored_floats(values: torch.Tensor | None) -> npt.NDArray[np.float32] | None:
    """A stored tensor as contiguous float32."""
    return None if values is None else values.detach().to(torch.float32).contiguous().numpy()
