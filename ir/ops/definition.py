"""What one dialect operator is: schema, reference, shape rule and cost in a single definition."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

NAMESPACE = "graphwright"
_library: torch.library.Library | None = None


@dataclass(frozen=True)
class Cost:
    """Work of one operator call.

    Attributes:
        macs: multiply-accumulates.
        weight_bytes: bytes of constant operands read.
        activation_bytes: bytes of activations read and written.
    """

    macs: int = 0
    weight_bytes: int = 0
    activation_bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.macs + other.macs,
            self.weight_bytes + other.weight_bytes,
            self.activation_bytes + other.activation_bytes,
        )


@dataclass(frozen=True)
class OpDefinition:
    """One dialect operator.

    Attributes:
        name: without namespace: ``rms_norm``.
        schema: signature in torch's schema language, without the name: ``(Tensor x, float eps) -> Tensor``.
        reference: plain PyTorch; the specification. Must be right in every floating dtype, float64 included, and must
            not return one of its inputs or a view of one.
        macs: multiply-accumulates of a call, given the arguments by name with tensors replaced by their concrete
            shapes.
        fake: shape and dtype rule; ``None`` runs the reference on fake tensors.
        differentiable: names of the tensor arguments a gradient may flow to. The backward recomputes the reference, so
            what is stored between forward and backward is only the inputs.
    """

    name: str
    schema: str
    reference: Callable[..., torch.Tensor]
    macs: Callable[[Mapping[str, Any]], int]
    fake: Callable[..., torch.Tensor] | None = None
    differentiable: tuple[str, ...] = ()

    @property
    def qualified_name(self) -> str:
        """``graphwright.rms_norm``, as written in the text form."""
        return f"{NAMESPACE}.{self.name}"

    @cached_property
    def target(self) -> torch._ops.OpOverload:
        """The registered operator, to be called or put into a graph; registered on first use."""
        global _library
        if _library is None:
            _library = torch.library.Library(NAMESPACE, "FRAGMENT")
        _library.define(self.name + self.schema)
        _library.impl(self.name, self.reference, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{self.name}", self.fake or self.reference, lib=_library)
        torch.library.register_autograd(
            f"{NAMESPACE}::{self.name}", self._backward, setup_context=self._setup_context, lib=_library
        )
        target: torch._ops.OpOverload = getattr(getattr(torch.ops, NAMESPACE), self.name).default
        return target

    def _setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        tensors = [value for value in inputs if isinstance(value, torch.Tensor)]
        ctx.save_for_backward(*tensors)
        ctx.is_tensor = [isinstance(value, torch.Tensor) for value in inputs]
        ctx.constants = [None if isinstance(value, torch.Tensor) else value for value in inputs]

    def _backward(self, ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        names = [item.name for item in self.target._schema.arguments]
        inputs: list[Any] = []
        wanted: list[int] = []
        for index, (is_tensor, constant) in enumerate(zip(ctx.is_tensor, ctx.constants, strict=True)):
            if not is_tensor:
                inputs.append(constant)
                continue
            value = next(saved).detach()
            if ctx.needs_input_grad[index] and names[index] in self.differentiable:
                value.requires_grad_()
                wanted.append(index)
            inputs.append(value)
        grads: list[torch.Tensor | None] = [None] * len(inputs)
        with torch.enable_grad():
            output = self.reference(*inputs)
        found = torch.autograd.grad(output, [inputs[index] for index in wanted], grad, allow_unused=True)
        for index, value in zip(wanted, found, strict=True):
            grads[index] = value
        return tuple(grads)
