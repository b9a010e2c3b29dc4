"""How far a right result may be off: the program's own rounding error, measured.

Two correct implementations differ by rounding. How much that makes at the output depends on the program, so it is
measured: every intermediate value is disturbed by random relative errors of the size of its dtype's rounding, and the
outputs are compared (stochastic arithmetic, Vignes 1978). Roundings inside quantised operators flip with it, as they
do between implementations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphwright.ir.arguments import argument
from graphwright.ir.names import op_name
from graphwright.ir.program import Program

# Size of the disturbance in units of the rounding step.
_STEPS = 1.0
TRIALS = 2
# Fraction of the dtype's range in which values are taken for results of arithmetic.
_ORDINARY = 0.01


class _Disturbed(fx.Interpreter):
    """Runs a program with noise on every floating value."""

    def __init__(self, module: fx.GraphModule, generator: torch.Generator) -> None:
        super().__init__(module, garbage_collect_values=True)
        self._generator = generator

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op != "call_function" or not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return value
        step = torch.finfo(value.dtype).eps * _STEPS
        noise = torch.randn(value.shape, generator=self._generator, dtype=torch.float32).to(value.dtype)
        # Relative to the value, and to the tensor's spread: where products cancel, the error of the sum stays.
        # The huge numbers that masks are made of are equal in every implementation, and stay so.
        ordinary = value.abs() < _ORDINARY * torch.finfo(value.dtype).max
        finite = value[ordinary]
        spread = finite.pow(2).mean().sqrt() if finite.numel() and _is_product(n) else value.new_zeros(())
        return torch.where(ordinary, value + noise * step * (value.abs() + spread), value)


class _RoundedActivations(fx.Interpreter):
    """Runs a program with the activations of weight-only linears rounded to int8 in blocks, as accuracy level 4."""

    def run_node(self, n: fx.Node) -> Any:
        if n.op != "call_function" or op_name(n) != "graphwright.linear_nbits":
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        block = min(max(int(argument(n, "group_size")), 16), 256)
        target: Callable[..., Any] = n.target  # type: ignore[assignment]
        return target(_rounded(args[0], block), *args[1:], **kwargs)


@dataclass(frozen=True)
class Gap:
    """How far one tensor is from another.

    Attributes:
        largest: largest absolute difference; infinite when one is not finite where the other is, or shapes differ.
        spread: root mean square of the differences.
    """

    largest: float
    spread: float

    def __or__(self, other: Gap) -> Gap:
        """The larger of both."""
        return Gap(max(self.largest, other.largest), max(self.spread, other.spread))


def disturbed(program: Program, generator: torch.Generator) -> Callable[..., tuple[Any, ...]]:
    """The program with its rounding disturbed, as a function of its flat inputs."""
    return _without_gradients(_Disturbed(program.body, generator).run)


def with_rounded_activations(program: Program) -> Callable[..., tuple[Any, ...]]:
    """The program with int8 activations in weight-only linears, as a function of its flat inputs."""
    return _without_gradients(_RoundedActivations(program.body).run)


def _without_gradients(function: Callable[..., Any]) -> Callable[..., tuple[Any, ...]]:
    def call(*inputs: torch.Tensor) -> tuple[Any, ...]:
        with torch.no_grad():
            return tuple(function(*inputs))

    return call


def rounding_error(program: Program, inputs: Sequence[torch.Tensor], plain: Sequence[Any]) -> list[Gap]:
    """The largest change that disturbed rounding makes to each of the program's plain outputs, over a few trials."""
    errors = [Gap(0.0, 0.0)] * len(plain)
    generator = torch.Generator().manual_seed(0)
    for _ in range(TRIALS):
        results = disturbed(program, generator)(*inputs)
        errors = [error | difference(one, other) for error, one, other in zip(errors, plain, results, strict=True)]
    return errors


def activation_error(program: Program, inputs: Sequence[torch.Tensor], plain: Sequence[Any]) -> list[Gap]:
    """The largest change that int8 activations in weight-only linears make to each of the program's plain outputs."""
    results = with_rounded_activations(program)(*inputs)
    return [difference(one, other) for one, other in zip(plain, results, strict=True)]


def run(program: Program, inputs: Sequence[torch.Tensor]) -> tuple[Any, ...]:
    """The program's flat outputs, without gradients."""
    with torch.no_grad():
        results: tuple[Any, ...] = program.body(*inputs)
    return results


def difference(one: Any, other: Any) -> Gap:
    """How far two outputs are apart."""
    if not isinstance(one, torch.Tensor):
        return Gap(0.0, 0.0) if one == other else Gap(math.inf, math.inf)
    a, b = one.detach().double(), other.detach().double()
    if a.shape != b.shape:
        return Gap(math.inf, math.inf)
    if a.numel() == 0:
        return Gap(0.0, 0.0)
    same = (a == b) | (a.isnan() & b.isnan())
    gap = torch.where(same, torch.zeros_like(a), (a - b).abs())
    if bool(gap.isnan().any()):
        return Gap(math.inf, math.inf)
    return Gap(float(gap.max()), float(gap.pow(2).mean().sqrt()))


def _is_product(node: fx.Node) -> bool:
    name = op_name(node)
    words = ("linear", "mm", "matmul", "attention", "conv", "sum", "mean", "norm")
    return any(word in name for word in words)


def _rounded(x: torch.Tensor, block: int) -> torch.Tensor:
    width = x.shape[-1]
    padded = torch.nn.functional.pad(x, (0, -width % block)).unflatten(-1, (-1, block))
    step = padded.abs().amax(dim=-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny) / 127
    rounded: torch.Tensor = ((padded / step).round() * step).flatten(-2)[..., :width]
    return rounded
