"""Linears on Kronecker products: within a derived bound on every instruction set, alike for any number of threads."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import graphwright as gw
from graphwright.backends.cpu import features, native_status
from graphwright.backends.cpu.kernels.kron_linear import KronLinear
from graphwright.ir import ops
from graphwright.ir.errors import BackendError
from graphwright.ir.ops.kronecker import b_first

pytestmark = pytest.mark.skipif(not native_status().available, reason=native_status().message)

UNIT = 2.0**-24
ROWS = [0, 1, 2, 3, 7, 40]
TAILS = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 130)
# (a, b) of every form: both orders, tall and flat, around tiles of 4 vectors and 8 rows.
SHAPES = [
    ((1, 1), (1, 1)),
    ((2, 3), (4, 2)),
    ((4, 2), (2, 3)),
    ((17, 9), (33, 7)),
    ((9, 17), (7, 33)),
    ((48, 16), (16, 48)),
    ((16, 48), (48, 16)),
    ((3, 256), (256, 3)),
    ((256, 3), (3, 256)),
    ((16, 64), (16, 32)),
]


def isas() -> list[str]:
    return [isa.name for isa in features().instruction_sets if isa.usable]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def bound(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float, after: torch.Tensor) -> torch.Tensor:
    """Each value is a chain of fused multiply-adds over a chain of them: one rounding for each, one for the factor, and
    one for the residual (Higham 2002, lemma 3.1)."""
    (_, a2), (_, b2) = a.shape, b.shape
    roundings = a2 + b2 + 2
    error = roundings * UNIT / (1 - roundings * UNIT)
    return error * (abs(scale) * x.double().abs() @ torch.kron(a.double().abs(), b.double().abs()).t() + after.abs())


def check(a: torch.Tensor, b: torch.Tensor, scale: float, rows: int) -> None:
    x, residual = random(rows, a.shape[1] * b.shape[1]), random(rows, a.shape[0] * b.shape[0], seed=1)
    wanted = scale * x.double() @ torch.kron(a.double(), b.double()).t()
    results = {isa: KronLinear(a, b, isa, scale) for isa in isas()}
    plain = {isa: kernel(x) for isa, kernel in results.items()}
    added = {isa: kernel(x, None, residual) for isa, kernel in results.items()}
    assert all(torch.equal(found, plain["scalar"]) for found in plain.values()), "instruction sets differ"
    assert all(torch.equal(found, added["scalar"]) for found in added.values()), "instruction sets differ"
    zero = torch.zeros(())
    assert ((plain["scalar"].double() - wanted).abs() <= bound(x, a, b, scale, zero)).all()
    limit = bound(x, a, b, scale, residual.double())
    assert ((added["scalar"].double() - wanted - residual.double()).abs() <= limit).all()


@pytest.mark.parametrize(("a", "b"), SHAPES)
@pytest.mark.parametrize("scale", [1.0, -0.3])
def test_values(a: tuple[int, int], b: tuple[int, int], scale: float) -> None:
    for rows in ROWS:
        check(random(*a), random(*b, seed=1), scale, rows)


def test_both_orders_are_among_the_shapes() -> None:
    assert {b_first(a, b) for a, b in SHAPES} == {True, False}


@pytest.mark.parametrize("size", TAILS)
def test_tails_in_each_of_the_four_sizes(size: int) -> None:
    for place in range(4):
        a1, a2, b1, b2 = (size if index == place else 3 for index in range(4))
        check(random(a1, a2), random(b1, b2, seed=1), 1.0, 2)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite(bad: float) -> None:
    """They are where the reference has them, in other rows of the input and of the factors nowhere."""
    a, b, x = torch.rand(5, 3) + 1, torch.rand(17, 4) + 1, torch.rand(3, 12) + 1
    x[1, 7] = bad
    broken = a.clone()
    broken[2, 1] = bad
    for first, given in ((a, x), (broken, torch.ones(2, 12))):
        wanted = ops.get("kron_linear").target(given, first, b)
        for isa in isas():
            torch.testing.assert_close(KronLinear(first, b, isa)(given), wanted, rtol=1e-5, atol=0, equal_nan=True)


@pytest.mark.parametrize("rows", [1, 2, 3, 50])
def test_the_number_of_threads_changes_nothing(rows: int) -> None:
    a, b = random(96, 96), random(64, 64, seed=1)  # so much that even one row is shared out
    x, residual = random(rows, 96 * 64), random(rows, 96 * 64, seed=1)
    before = torch.get_num_threads()
    try:
        for isa in isas():
            kernel, found = KronLinear(a, b, isa, 0.5), []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                found.append(kernel(x, None, residual))
            assert all(torch.equal(each, found[0]) for each in found), isa
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_dtypes_are_computed_in_float32(dtype: torch.dtype) -> None:
    a, b, x = random(4, 6).to(dtype), random(5, 3, seed=1).to(dtype), random(2, 3, 18).to(dtype)
    found = KronLinear(a, b, isas()[-1], 2.0)(x)
    assert found.dtype == dtype
    assert torch.equal(found, KronLinear(a.float(), b.float(), isas()[-1], 2.0)(x.float()).to(dtype))


class Adapted(nn.Module):
    """A linear with a Kronecker branch beside it."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.base = nn.Linear(24, 35, dtype=dtype)
        self.a, self.b = nn.Parameter(random(7, 4).to(dtype)), nn.Parameter(random(5, 6).to(dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branch: torch.Tensor = ops.get("kron_linear").target(x, self.a, self.b, 0.5)
        total: torch.Tensor = self.base(x) + branch
        return total


def test_the_sum_with_the_base_costs_no_pass_and_a_file_keeps_the_kernel(tmp_path: Path) -> None:
    model, x = Adapted().eval(), random(2, 3, 24)
    small = gw.optimize(model, [], example_inputs=(x,), target="cpu")
    uses = {use.op: use.kernel for use in small.explain()}
    assert uses["graphwright.kron_linear"].startswith("kron_linear ")
    assert uses["aten.add.Tensor"].startswith("epilogue of ")
    torch.testing.assert_close(small(x), model(x), rtol=1e-5, atol=1e-5)
    small.save_packed(tmp_path / "model.packed")
    assert torch.equal(gw.load_packed(tmp_path / "model.packed")(x), small(x))


def test_what_has_no_kernel_runs_the_reference_and_says_why() -> None:
    double, x = Adapted(torch.float64).eval(), random(2, 24).double()
    small = gw.optimize(double, [], example_inputs=(x,), target="cpu")
    (use,) = (use for use in small.explain() if use.op == "graphwright.kron_linear")
    assert (use.kernel, use.reason) == ("reference", "the kernels compute in float32")
    assert torch.equal(small(x), double(x))


def test_operands_that_do_not_fit_are_refused() -> None:
    kernel = KronLinear(random(7, 4), random(5, 6), isas()[-1])
    with pytest.raises(BackendError, match="24 features"):
        kernel(torch.zeros(2, 23))
    with pytest.raises(BackendError, match="does not fit"):
        kernel(torch.zeros(2, 24), None, torch.zeros(2, 34))
    raw = np.zeros((2, 23), np.float32), np.zeros((2, 35), np.float32)
    with pytest.raises(ValueError, match="number of columns"):
        kernel._kernel.run(*raw, 1)
    with pytest.raises(ValueError, match="wrong shape"):
        kernel._kernel.run(np.zeros((2, 24), np.float32), np.zeros((2, 34), np.float32), 1)
    with pytest.raises(ValueError, match="there must be"):
        KronLinear(torch.zeros(0, 4), random(5, 6), isas()[-1])
