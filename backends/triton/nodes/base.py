"""What a node's kernel is to the lowering: a module, the arguments it takes as it runs, and its name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import fx, nn

from graphwright.backends.triton.kernels.epilogue import Epilogue
from graphwright.backends.triton.launching import recorded
from graphwright.backends.triton.nodes.epilogues import branch_in_torch, epilogue_in_torch
from graphwright.ir.arguments import arguments_of
from graphwright.ir.program import Program

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class NodeKernel(nn.Module):
    """Kernels in place of a node.

    Attributes:
        inputs: names of the operator's arguments that it is called with, in order.
        runner: whose kernels they are, for ``explain()``: ``"triton"`` or ``"torch"``.
        label: what ``explain()`` calls it.
        launched: what the first call that launched something has launched, for ``explain()``; empty before.
        idle: whether the last call has launched nothing, as where only PyTorch gives a gradient that is wanted.
        planned: what one of the traced sizes would launch; empty until somebody asks.
    """

    inputs: tuple[str, ...]
    runner: str = "triton"
    label: str
    launched: str = ""
    idle: bool = False
    planned: str = ""

    def __call__(self, *inputs: Any) -> Any:
        """Run; until something is launched, note what is."""
        if self.launched or self.runner != "triton":
            return self.forward(*inputs)
        with recorded() as launches:
            result = self.forward(*inputs)
        self.launched, self.idle = "; ".join(map(str, launches)), not launches
        return result


class LinearKernel(NodeKernel, ABC):
    """A linear that can do what follows it; what its kernel does at once is done in steps where gradients are wanted.

    Attributes:
        activation: set by the lowering when it takes one in.
        branch_scale: likewise, of the low-rank branch.
    """

    inputs = ("x", "bias")
    activation = ""
    branch_scale = 1.0

    def forward(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
        down: torch.Tensor | None = None,
        up: torch.Tensor | None = None,
        factor: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``activation(product + bias + scale · down upᵀ) * factor + residual``."""
        if wants_gradient(x, bias, down, up, factor, residual):
            y = branch_in_torch(self.with_gradients(x, bias), down, up, self.branch_scale)
            return epilogue_in_torch(y, self.activation, factor, residual)
        return self.fused(x, Epilogue(bias, self.activation, factor, residual, down, up, self.branch_scale))

    @abstractmethod
    def with_gradients(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """``product + bias``, to which gradients flow back."""

    @abstractmethod
    def fused(self, x: torch.Tensor, epilogue: Epilogue) -> torch.Tensor:
        """The product and all that follows it, without gradients."""


@dataclass(frozen=True)
class Site:
    """A node that may get a kernel.

    Attributes:
        program: where it stands.
        node: the call.
        device: that it will run on.
    """

    program: Program
    node: fx.Node
    device: torch.device

    @cached_property
    def _moved(self) -> dict[str, torch.Tensor]:
        return {}

    @cached_property
    def arguments(self) -> dict[str, Any]:
        """The node's arguments by name; defaults are filled in."""
        return arguments_of(self.node)

    def is_stored(self, name: str) -> bool:
        """Whether an argument is a parameter or buffer of the program, or ``None``."""
        value = self.arguments[name]
        return value is None or (isinstance(value, fx.Node) and value.op == "get_attr")

    def stored(self, name: str) -> torch.Tensor:
        """The tensor of an argument, on the device; the same one each time."""
        if name not in self._moved:
            self._moved[name] = self.program.tensor(self.arguments[name]).detach().to(self.device)
        return self._moved[name]

    def maybe_stored(self, name: str) -> torch.Tensor | None:
        """Like :meth:`stored`, and ``None`` for an argument that is ``None``."""
        return None if self.arguments[name] is None else self.stored(name)

    def value(self, name: str) -> torch.Tensor:
        """The fake tensor of an argument: its shape (sizes may be symbols) and dtype."""
        value: torch.Tensor = self.arguments[name].meta["val"]
        return value

    def unlike(self, *names: str) -> str | None:
        """Why no kernel takes these arguments: a dtype that there are none for, or several; ``None`` where they do."""
        dtypes = {self.value(name).dtype for name in names if self.arguments[name] is not None}
        for dtype in dtypes:
            if dtype not in DTYPES:
                return f"the kernels compute in float16, bfloat16 and float32, not {str(dtype).removeprefix('torch.')}"
        return "its operands are of several dtypes" if len(dtypes) > 1 else None


# The kernel of a node, or why it has none.
Lowering = Callable[[Site], NodeKernel | str]


def wants_gradient(*values: Any) -> bool:
    """Whether a gradient will be asked for one of these values."""
    return torch.is_grad_enabled() and any(isinstance(each, torch.Tensor) and each.requires_grad for each in values)
