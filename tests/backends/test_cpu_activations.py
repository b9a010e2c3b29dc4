"""The C++ activations: within a derived bound of float64 everywhere, equal to the last bit on every instruction set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from graphwright.backends.cpu import features, native_status
from graphwright.backends.cpu.kernels.pointwise import (
    FUNCTIONS,
    Activation,
    Combination,
    Difference,
    GatedActivation,
    LeakyRelu,
)
from graphwright.ir.errors import BackendError
from graphwright.ir.ops.activation import ACTIVATIONS, gated_activation

pytestmark = pytest.mark.skipif(not native_status().available, reason=native_status().message)

WIDTHS = [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 64, 100, 768, 1000]
ROWS = [0, 1, 2, 5, 200]
HALF_ULP = 2.0**-24


def isas() -> list[str]:
    """Usable instruction sets with kernels of their own."""
    usable = [isa.name for isa in features().instruction_sets if isa.usable]
    return [isa for isa in usable if Activation(isa, "relu").label == f"relu {isa}"]


def grid() -> torch.Tensor:
    """Dense where the functions bend, every magnitude from the subnormal numbers on, and what is not finite."""
    sizes = torch.logspace(-45, 38, 20001, dtype=torch.float64)
    special = [0.0, -0.0, float("inf"), float("-inf"), float("nan"), 88.3, 88.5, 88.72, 89.0, 1e-45, -1e-45]
    parts = [
        torch.linspace(-100, 100, 100001, dtype=torch.float64),
        torch.linspace(-8, 8, 100001, dtype=torch.float64),
        sizes,
        -sizes,
        torch.tensor(special, dtype=torch.float64),
    ]
    return torch.cat(parts).float()


def exact(function: str, x: torch.Tensor) -> torch.Tensor:
    """float64, in forms that do not cancel for negative values."""
    found: torch.Tensor
    if function == "gelu":
        found = 0.5 * x * torch.special.erfc(-x / 2**0.5)
    elif function == "gelu_tanh":
        found = x * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))
    elif function == "silu":
        found = x * torch.sigmoid(x)
    else:
        found = getattr(torch, function)(x)
    return found


def bound(function: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """What rounding may do.

    e^x is off by 3 half units (rounding of the reduced argument, of the polynomial and of its fit), the sum and the
    quotient that follow by one each. It overflows at 88.4 instead of 88.7: what would be below 5e-39 there is 0. The
    least number there is, 2^-149, may be lost.
    """
    size, least = x.abs(), 2.0**-149
    if function == "relu":
        return torch.zeros_like(x)
    if function == "tanh":
        return 4 * HALF_ULP * y.abs() + least
    if function == "sigmoid":
        return 5 * HALF_ULP * y.abs() + 5e-39 + least
    if function == "silu":
        return 5 * HALF_ULP * y.abs() + 5e-39 * size + least
    if function == "gelu_tanh":
        # The sigmoid's argument t has a relative error of 4 half units; |t| times the sigmoid's slope is below 0.224.
        return 5 * HALF_ULP * y.abs() + (4 * 0.224 * HALF_ULP + 5e-39) * size.clamp(max=100) + least
    # The tail is off by the fit, 1.6e-8 with its coefficients rounded, and half a unit; beyond 5.81 it is taken for 0.
    tail = 0.5 * torch.special.erfc(size / 2**0.5)
    allowed: torch.Tensor = 2 * HALF_ULP * y.abs() + least + (1.7e-8 + 2 * HALF_ULP * tail) * size.clamp(max=6)
    return allowed


@pytest.mark.parametrize("function", FUNCTIONS)
def test_activations_everywhere(function: str) -> None:
    x = grid()
    results = [Activation(isa, function)(x) for isa in isas()]
    number = ~results[0].isnan()
    for found in results:
        assert torch.equal(found.isnan(), ~number)
        assert torch.equal(found[number].view(torch.int32), results[0][number].view(torch.int32)), isas()
    wide = x.double()
    wanted = exact(function, wide)
    assert torch.equal(wanted.isnan(), ~number)
    finite = wanted.isfinite() & wide.isfinite()
    error = (results[0].double() - wanted).abs()[finite]
    allowed = bound(function, wide, wanted)[finite]
    assert (error <= allowed).all(), x[finite][error > allowed]
    infinite = ~finite & number
    assert torch.equal(results[0][infinite].double(), wanted[infinite])
    zero = torch.tensor([0.0, -0.0])
    if function != "sigmoid":
        assert Activation(isas()[-1], function)(zero).signbit().tolist() == [False, True]


@pytest.mark.parametrize("columns", WIDTHS)
def test_every_width_and_stride(columns: int) -> None:
    generator = torch.Generator().manual_seed(columns)
    for rows in ROWS:
        both = torch.randn(rows, 2 * columns + 1, generator=generator) * 3
        gate, up = both[:, :columns], both[:, columns : 2 * columns]
        whole = [GatedActivation(isa, "silu")(gate, up) for isa in isas()]
        assert all(torch.equal(found, whole[0]) for found in whole)
        torch.testing.assert_close(whole[0], functional.silu(gate) * up, rtol=1e-6, atol=1e-6)
        alone = [Activation(isa, "gelu")(gate) for isa in isas()]
        assert all(torch.equal(found, alone[0]) for found in alone)
        assert torch.equal(alone[0], Activation(isas()[0], "gelu")(gate.contiguous()))
        torch.testing.assert_close(alone[0], functional.gelu(gate), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gates(activation: str) -> None:
    buffer = torch.randn(2, 5, 2 * 33)
    gate, up = buffer.chunk(2, dim=-1)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        wanted = gated_activation(gate.to(dtype).double(), up.to(dtype).double(), activation)
        found = GatedActivation(isas()[-1], activation)(gate.to(dtype), up.to(dtype))
        assert found.dtype == dtype
        rounding = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
        torch.testing.assert_close(found.double(), wanted, rtol=rounding, atol=1e-6)


def layouts() -> dict[str, Callable[[], torch.Tensor]]:
    x = torch.randn(2, 3, 4, 10)
    return {
        "transposed": lambda: x.transpose(1, 2),
        "last moved": lambda: x.movedim(-1, 1),
        "half": lambda: x[..., :5],
        "half, transposed": lambda: x[..., :5].transpose(1, 2),
        "every second": lambda: x[..., ::2],
        "repeated": lambda: x[:, :1].expand(2, 3, 4, 10),
        "number": lambda: torch.tensor(0.5),
        "vector": lambda: x.flatten(),
        "empty": lambda: x[:0],
        "no columns": lambda: x[..., :0],
    }


@pytest.mark.parametrize("layout", layouts())
def test_results_lie_in_memory_as_pytorch_would_lay_them(layout: str) -> None:
    x = layouts()[layout]()
    found, wanted = Activation(isas()[-1], "tanh")(x), torch.tanh(x)
    assert found.shape == wanted.shape
    assert found.stride() == wanted.stride() or x.numel() == 0
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)
    gated = GatedActivation(isas()[-1], "relu")(x, x)
    assert gated.stride() == (functional.relu(x) * x).stride() or x.numel() == 0
    assert torch.equal(gated, functional.relu(x) * x)


def test_the_number_of_threads_changes_nothing() -> None:
    before, kernel = torch.get_num_threads(), GatedActivation(isas()[-1], "gelu")
    x = torch.randn(300, 2 * 333)
    try:
        for given in (x.chunk(2, dim=-1), (x, x.flip(0)), (x[:1], x[1:2])):
            results = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(kernel(*given))
            assert all(torch.equal(found, results[0]) for found in results)
    finally:
        torch.set_num_threads(before)


def test_what_does_not_fit() -> None:
    kernel = GatedActivation("scalar", "relu")
    with pytest.raises(BackendError, match="takes floating CPU tensors"):
        kernel(torch.ones(3, dtype=torch.int64), torch.ones(3))
    with pytest.raises(BackendError, match="takes tensors of one shape"):
        kernel(torch.ones(3), torch.ones(4))
    with pytest.raises(ValueError, match="no activation is called 'mish'"):
        Activation("scalar", "mish")


def test_the_extension_refuses_arrays_that_do_not_fit() -> None:
    from graphwright.backends.cpu import _native

    kernel, x, y = _native.Pointwise("scalar", "relu"), np.ones((3, 4), np.float32), np.ones((3, 4), np.float32)
    kernel.run(x, None, y, 1)
    with pytest.raises(ValueError, match="differ in shape"):
        kernel.run(x, None, y[:2], 1)
    with pytest.raises(ValueError, match="differ in shape"):
        kernel.run(x, x[:, :2], y, 1)
    with pytest.raises(ValueError, match="must be contiguous"):
        kernel.run(x[:, ::2], None, np.ones((3, 2), np.float32), 1)
    with pytest.raises(ValueError, match="rows of the result overlap"):
        kernel.run(x, None, np.lib.stride_tricks.as_strided(y, (3, 4), (4, 4)), 1)
    with pytest.raises(TypeError):
        kernel.run(x, None, y.astype(np.float64), 1)


SHAPES = [
    ((2, 5, 40), (2, 5, 40)),
    ((2, 5, 40), (5, 40)),
    ((2, 5, 40), (1, 5, 40)),
    ((2, 5, 40), (40,)),
    ((2, 5, 40), (1,)),
    ((2, 5, 40), (2, 1, 40)),
    ((2, 5, 40), (2, 5, 1)),
    ((1, 1, 1), (1, 1, 1)),
    ((40,), (3, 40)),
    ((0, 40), (40,)),
    ((300, 700), (300, 700)),
]


@pytest.mark.parametrize(("first", "second"), SHAPES)
@pytest.mark.parametrize("adds", [True, False])
def test_sums_and_products(first: tuple[int, ...], second: tuple[int, ...], adds: bool) -> None:
    x, y = torch.randn(first), torch.randn(second)
    wanted = x + y if adds else x * y
    for isa in isas():
        assert torch.equal(Combination(isa, adds)(x, y), wanted)
        assert torch.equal(Combination(isa, adds)(y, x), wanted)
    if x.dim() == y.dim() > 1:
        assert torch.equal(Combination(isas()[-1], adds)(x.mT, y.mT), wanted.mT)


@pytest.mark.parametrize("columns", WIDTHS)
def test_differences(columns: int) -> None:
    x, y = torch.randn(3, 2, columns), torch.randn(3, 2, columns)
    x.view(-1)[0], y.view(-1)[-1] = float("inf"), float("nan")
    for isa in isas():
        kernel = Difference(isa)
        assert torch.equal(kernel(x, y).nan_to_num(7.5), (x - y).nan_to_num(7.5))
        assert torch.equal(
            kernel(x.transpose(0, 1), y.transpose(0, 1)).nan_to_num(7.5).transpose(0, 1), (x - y).nan_to_num(7.5)
        )
    with pytest.raises(BackendError, match="cannot subtract"):
        Difference(isas()[-1])(x, y[:1])


def run_step(instruction: Any, operands: list[np.ndarray], result: tuple[int, ...]) -> np.ndarray:
    """One instruction, run by the executor."""
    from graphwright.backends.cpu import _native

    executor = _native.Executor(0)
    sizes = [[[0, size] for size in each.shape] for each in operands]
    inputs = [executor.input("float32", each) for each in sizes]
    target = executor.buffer("float32", [[0, size] for size in result])
    executor.add_step(instruction, [*inputs, target], len(inputs))
    executor.output(target)
    (found,) = _native.Runner(executor).run(operands, 2)
    return np.array(found)


@pytest.mark.parametrize("columns", [1, 2, 3, 7, 8, 9, 17, 33])
@pytest.mark.parametrize("adds", [True, False])
def test_a_number_for_each_row_of_the_batch(columns: int, adds: bool) -> None:
    """What the executor does where PyTorch's kernel would broadcast."""
    for batch, tokens in ((1, 1), (3, 1), (1, 4), (3, 4), (2, 200)):
        x, y = torch.randn(batch, tokens, columns), torch.randn(batch, 1, 1)
        wanted = x + y if adds else x * y
        for isa in isas():
            step = Combination(isa, adds).step((("b", "s", columns), ("b", 1, 1)), ("b", "s", columns))
            assert step is not None
            found = run_step(step.instruction, [x.numpy(), y.numpy()], (batch, tokens, columns))
            assert np.array_equal(found, wanted.numpy()), (isa, batch, tokens)


def test_what_cannot_be_combined() -> None:
    kernel = Combination(isas()[-1], True)
    for x, y in [
        (torch.ones(2, 1), torch.ones(1, 2)),
        (torch.ones(2), torch.ones(3)),
        (torch.ones(2), torch.ones(2).half()),
    ]:
        with pytest.raises((BackendError, RuntimeError)):
            kernel(x, y)


@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize("adds", [True, False])
def test_numbers_and_tensors_without_dimensions(columns: int, adds: bool) -> None:
    x = torch.randn(5, columns)
    for number in (0.5, -3.0, float("inf")):
        wanted = x + number if adds else x * number
        for isa in isas():
            assert torch.equal(Combination(isa, adds, number)(x), wanted)
            assert torch.equal(Combination(isa, adds)(x, torch.tensor(number)), wanted)
            assert torch.equal(Combination(isa, adds)(torch.tensor(number), x), wanted)
            assert torch.equal(Combination(isa, adds, number)(x.mT), wanted.mT)
    half = x.half()
    found = Combination(isas()[-1], adds)(half, torch.tensor(0.5))
    assert found.dtype == torch.float16  # as torch has it: a tensor without dimensions does not widen the result
    assert torch.equal(found, half + 0.5 if adds else half * 0.5)


@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize("slope", [0.8, 0.0, -1.0, 2.0])
def test_leaky_relu(columns: int, slope: float) -> None:
    x = torch.randn(4, columns)
    x.view(-1)[: min(columns, 5)] = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf")])[:columns]
    wanted = functional.leaky_relu(x, slope)
    for isa in isas():
        found = LeakyRelu(isa, slope)(x)
        torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(found.signbit(), wanted.signbit()) or slope <= 0
        torch.testing.assert_close(LeakyRelu(isa, slope)(x.mT), wanted.mT, rtol=0, atol=0, equal_nan=True)
    assert LeakyRelu("scalar", slope)(torch.empty(0, columns)).shape == (0, columns)


def test_the_extension_refuses_combinations_it_has_not() -> None:
    from graphwright.backends.cpu import _native

    with pytest.raises(ValueError, match="cannot be combined by 'divide'"):
        _native.Pointwise("scalar", "", "divide")
    x = np.ones((3, 4), np.float32)
    with pytest.raises(ValueError, match="is a number"):
        _native.Pointwise("scalar", "", "add", 2.0).run(x, x, x.copy(), 1)
