"""Epilogues of linears: right, equal on every instruction set, taken in from a graph only where that is the same."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import graphwright as gw
from graphwright.backends.cpu import features, native_status
from graphwright.backends.cpu.kernels.byte_linear import ByteLinear
from graphwright.backends.cpu.kernels.byte_packing import pack_int8
from graphwright.backends.cpu.kernels.float_linear import FloatLinear, pack_floats
from graphwright.backends.cpu.kernels.linear import Linear
from graphwright.ir.errors import BackendError

pytestmark = pytest.mark.skipif(not native_status().available, reason=native_status().message)

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "": lambda x: x,
    "relu": functional.relu,
    "silu": functional.silu,
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),  # torch's own gives NaN at infinity, on some vectors
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "tanh": torch.tanh,
}


def isas() -> list[str]:
    return [isa.name for isa in features().instruction_sets if isa.usable]


def linear(isa: str, outputs: int, columns: int) -> ByteLinear:
    generator = torch.Generator().manual_seed(outputs)
    weight = torch.randint(-127, 128, (outputs, columns), dtype=torch.int8, generator=generator)
    scales = torch.rand(outputs, generator=generator) * 0.01
    return ByteLinear(pack_int8(weight, scales), isa, "shifted", torch.randn(outputs, generator=generator))


@pytest.mark.parametrize("outputs", [1, 16, 63, 130])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("rows", [1, 7])
def test_what_a_kernel_does_to_its_sums(outputs: int, activation: str, rows: int) -> None:
    torch.manual_seed(rows)
    x, wide = torch.randn(rows, 40), torch.randn(2, rows, outputs + 3)
    factor, residual = wide[0, :, 1 : outputs + 1], wide[1, :, 2 : outputs + 2]
    for given in [(None, None), (factor, None), (None, residual), (factor, residual)]:
        results = []
        for isa in isas():
            kernel = linear(isa, outputs, 40)
            plain = kernel(x).double()
            kernel.activation = activation
            results.append(kernel(x, *given))
        assert all(torch.equal(found, results[0]) for found in results)
        times, plus = (
            (torch.ones(1) if given[0] is None else factor),
            (torch.zeros(1) if given[1] is None else residual),
        )
        wanted = ACTIVATIONS[activation](plain) * times.double() + plus.double()
        # An activation is off by a few units in the last place of its argument, each of the others by half a unit.
        bound = 2**-21 * plain.abs() * times.double().abs() + 2**-23 * (wanted.abs() + plus.double().abs()) + 1e-38
        assert ((results[0].double() - wanted).abs() <= bound).all()


@pytest.mark.parametrize("rows", [0, 1, 2, 7])
@pytest.mark.parametrize("outputs", [1, 17, 130])
def test_one_row_of_an_operand_serves_all(rows: int, outputs: int) -> None:
    x, factor, residual = torch.randn(rows, 40), torch.randn(outputs), torch.randn(outputs)
    for isa in isas():
        kernels: list[Linear] = [linear(isa, outputs, 40), FloatLinear(pack_floats(torch.randn(outputs, 40)), isa)]
        for kernel in kernels:
            found = kernel(x, factor, residual)
            assert torch.equal(found, kernel(x, factor.expand(rows, -1), residual.expand(rows, -1)))


def test_not_a_number_and_infinity_go_through_activations() -> None:
    values = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e30, -1e30, 1e-40])
    weight = torch.zeros(len(values), 4, dtype=torch.int8)
    for isa in isas():
        for name, function in ACTIVATIONS.items():
            kernel = ByteLinear(pack_int8(weight, torch.ones(len(values))), isa, "shifted", values)
            kernel.activation = name
            found = kernel(torch.zeros(1, 4))[0].double()
            torch.testing.assert_close(found, function(values.double()), rtol=1e-6, atol=1e-37, equal_nan=True)


@pytest.mark.parametrize("outputs", [1040, 1041])
def test_large_results_are_those_of_small_ones(outputs: int) -> None:
    """They go past the caches where rows are aligned (1040 outputs), and not where they are not."""
    x, residual = torch.randn(1100, 8), torch.randn(1100, outputs)
    weight = torch.randn(outputs, 8)
    for isa in isas():
        kernels: list[Linear] = [linear(isa, outputs, 8), FloatLinear(pack_floats(weight), isa, torch.randn(outputs))]
        for kernel in kernels:
            kernel.activation = "gelu"
            parts = [kernel(x[i : i + 100], None, residual[i : i + 100]) for i in range(0, 1100, 100)]
            assert torch.equal(kernel(x, None, residual), torch.cat(parts)), kernel.label


def test_operands_of_another_shape_are_refused() -> None:
    kernel = linear(isas()[-1], 8, 16)
    x = torch.randn(2, 3, 16)
    assert kernel(x, torch.ones(2, 3, 8), torch.zeros(2, 3, 8)).shape == (2, 3, 8)
    for other in (torch.ones(2, 3, 1), torch.ones(3, 2, 8), torch.ones(3), torch.ones(2, 3, 8, dtype=torch.int64)):
        with pytest.raises(BackendError, match="does not fit"):
            kernel(x, other)
    empty = torch.empty(0, 16)
    assert kernel(empty, torch.ones(8), torch.ones(8)).shape == (0, 8)
    assert kernel(empty, torch.empty(0, 8), torch.empty(0, 8)).shape == (0, 8)
    raw, y = np.zeros((2, 16), np.float32), np.zeros((2, 8), np.float32)
    with pytest.raises(ValueError, match="activation"):
        kernel._kernel.run(raw, y, 1, "swish")
    with pytest.raises(ValueError, match="y's shape"):
        kernel._kernel.run(raw, y, 1, "", np.zeros((2, 7), np.float32))
    with pytest.raises(ValueError, match="whole rows"):
        kernel._kernel.run(raw, y, 1, "", np.zeros((8, 2), np.float32).T)


class Chain(nn.Module):
    """A linear and what a function makes of its output ``y``, another linear's ``z`` and the input ``x``."""

    def __init__(self, after: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.after = nn.Linear(32, 32), nn.Linear(32, 32), after

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(self.first(x), self.second(x), x)


TAKEN = {
    "activation": (lambda y, z, x: functional.gelu(y) @ z.transpose(-1, -2), ["aten.gelu"]),
    "tanh approximation": (lambda y, z, x: functional.gelu(y, approximate="tanh").cumsum(-1), ["aten.gelu"]),
    "residual": (lambda y, z, x: (y + x).cumsum(-1), ["aten.add.Tensor"]),
    "residual on the left": (lambda y, z, x: (x + y).cumsum(-1), ["aten.add.Tensor"]),
    "gate": (lambda y, z, x: (functional.silu(y) * z).cumsum(-1), ["aten.silu", "aten.mul.Tensor"]),
    "all": (lambda y, z, x: functional.relu(y) * z + x, ["aten.relu", "aten.mul.Tensor", "aten.add.Tensor"]),
    "two linears": (lambda y, z, x: y + z, ["aten.add.Tensor"]),
    "a factor for each output": (lambda y, z, x: y * x[0, 0].cumsum(-1) + z, ["aten.mul.Tensor", "aten.add.Tensor"]),
    "a residual for each output": (lambda y, z, x: (y + x[0, 0].cumsum(-1)).cumsum(-1), ["aten.add.Tensor"]),
}
LEFT = {
    "another user": (lambda y, z, x: functional.gelu(y) + y.cumsum(-1), "aten.gelu"),
    "broadcast": (lambda y, z, x: y + x[:1, :1], "aten.add.Tensor"),
    "a number": (lambda y, z, x: y * 2.0, "aten.mul.Tensor"),
    "alpha": (lambda y, z, x: torch.add(x, y, alpha=2), "aten.add.Tensor"),
    "twice the same": (lambda y, z, x: y * y, "aten.mul.Tensor"),
    "wrong order": (lambda y, z, x: functional.gelu(y + x), "aten.gelu"),
    "wider result": (lambda y, z, x: y + x.double(), "aten.add.Tensor"),
}


class Normed(nn.Module):
    """A norm of a sum, and what a function makes of the norm ``n``, the sum ``s`` and a term ``x``."""

    def __init__(
        self, after: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor], rms: bool, early: bool = False
    ) -> None:
        super().__init__()
        self.norm, self.after = nn.RMSNorm(32, eps=1e-6) if rms else nn.LayerNorm(32), after
        self.early = early

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        total = x.cumsum(-1) + y
        if self.early:  # the sum is used before the norm
            x = total.cumsum(1)
        return self.after(self.norm(total), total, x)


@pytest.mark.parametrize("rms", [False, True])
def test_norms_take_in_the_sum_before_them(rms: bool) -> None:
    cases = [
        (lambda n, s, x: n.cumsum(0), False),
        (lambda n, s, x: n.cumsum(0) * s, False),  # the sum is used again, later
        (lambda n, s, x: n.cumsum(0) * x, True),
    ]
    x, y = torch.randn(2, 5, 32), torch.randn(2, 5, 32)
    for after, early in cases:
        model = Normed(after, rms, early).eval()
        small = gw.optimize(model, [gw.FuseAll()], example_inputs=(x, y), target="cpu", verify=False)
        found = [use.kernel for use in small.explain() if use.op == "aten.add.Tensor"]
        if not (early and rms):  # fusing the norm puts it before the other use
            assert [kernel.startswith("part of add + ") for kernel in found] == [not early], found
        torch.testing.assert_close(small(x, y), model(x, y), rtol=1e-5, atol=1e-5)
    for first, second in [((2, 5, 32), (32,)), ((5, 32), (2, 5, 32))]:  # a term is broadcast
        x, y = torch.randn(first), torch.randn(second)
        model = Normed(lambda n, s, x: n.cumsum(0), rms).eval()
        small = gw.optimize(model, [gw.FuseAll()], example_inputs=(x, y), target="cpu", verify=False)
        assert not any("part of" in use.kernel for use in small.explain())
        torch.testing.assert_close(small(x, y), model(x, y), rtol=1e-5, atol=1e-5)


def lowered(model: nn.Module, x: torch.Tensor) -> gw.OptimizedModel:
    passes = [gw.QuantizeLinears(bits=8, activations="int8")]
    return gw.optimize(model, passes, example_inputs=(x,), target="cpu", verify=False)


@pytest.mark.parametrize("name", TAKEN)
def test_taken_in(name: str) -> None:
    after, ops = TAKEN[name]
    model, x = Chain(after).eval(), torch.randn(2, 5, 32)
    small = lowered(model, x)
    uses = {use.op: use.kernel for use in small.explain()}
    assert all(uses[op].startswith("epilogue of byte_linear") for op in ops), uses
    torch.testing.assert_close(small(x), reference(small, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", LEFT)
def test_left_alone(name: str) -> None:
    after, op = LEFT[name]
    model, x = Chain(after).eval(), torch.randn(2, 5, 32)
    small = lowered(model, x)
    assert not any(use.op == op and use.kernel.startswith("epilogue") for use in small.explain())
    torch.testing.assert_close(small(x), reference(small, x), rtol=1e-5, atol=1e-5)


def reference(small: gw.OptimizedModel, x: torch.Tensor) -> torch.Tensor:
    """The same program in PyTorch."""
    result: torch.Tensor = gw.optimize(small, [], example_inputs=(x,), target="reference")(x)
    return result
