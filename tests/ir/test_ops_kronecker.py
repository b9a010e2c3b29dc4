"""The linear on a Kronecker product against the product written out: values, shapes, gradients, tails, cost."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphwright.ir import ops
from graphwright.ir.ops.kronecker import b_first, kron_linear, products

DOUBLE = torch.float64
TAILS = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33)


def call(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *scale: float) -> torch.Tensor:
    result: torch.Tensor = ops.get("kron_linear").target(x, a, b, *scale)
    return result


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def by_hand(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """One entry of the Kronecker product after another, summed exactly rounded."""
    (a1, a2), (b1, b2) = a.shape, b.shape
    result = torch.zeros(*x.shape[:-1], a1 * b1, dtype=DOUBLE)
    for row in range(a1 * b1):
        entries = [float(a[row // b1, k // b2] * b[row % b1, k % b2]) for k in range(a2 * b2)]
        for at, values in zip(result.view(-1, a1 * b1), x.reshape(-1, a2 * b2).tolist(), strict=True):
            at[row] = scale * math.fsum(w * v for w, v in zip(entries, values, strict=True))
    return result


@settings(max_examples=60)
@given(st.tuples(*[st.integers(1, 5)] * 4), st.sampled_from([1.0, 0.25, 16.0, -3.0]), st.integers(0, 1000))
def test_it_is_the_product_with_the_kronecker_product(sizes: tuple[int, ...], scale: float, seed: int) -> None:
    a1, a2, b1, b2 = sizes
    x, a, b = random(2, 3, a2 * b2, seed=seed), random(a1, a2, seed=seed + 1), random(b1, b2, seed=seed + 2)
    found = call(x, a, b, scale)
    torch.testing.assert_close(found, by_hand(x, a, b, scale), rtol=0, atol=1e-12 * abs(scale))
    torch.testing.assert_close(found, scale * x @ torch.kron(a, b).t(), rtol=0, atol=1e-12 * abs(scale))


@pytest.mark.parametrize("size", TAILS)
def test_tails_in_each_of_the_four_sizes(size: int) -> None:
    for place in range(4):
        a1, a2, b1, b2 = (size if index == place else 3 for index in range(4))
        x, a, b = random(2, a2 * b2), random(a1, a2, seed=1), random(b1, b2, seed=2)
        torch.testing.assert_close(call(x, a, b), x @ torch.kron(a, b).t(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("rows", [(), (0,), (1,), (2, 3), (2, 0, 3)])
def test_any_number_of_leading_dimensions(rows: tuple[int, ...]) -> None:
    x, a, b = random(*rows, 6), random(4, 2, seed=1), random(5, 3, seed=2)
    found = call(x, a, b)
    assert found.shape == (*rows, 20)
    torch.testing.assert_close(found, x @ torch.kron(a, b).t(), rtol=0, atol=1e-13)


@pytest.mark.parametrize(("a", "b"), [((0, 2), (5, 3)), ((4, 0), (5, 3)), ((4, 2), (0, 3)), ((4, 2), (5, 0))])
def test_empty_factors(a: tuple[int, int], b: tuple[int, int]) -> None:
    found = call(torch.ones(2, a[1] * b[1]), torch.ones(a), torch.ones(b))
    assert found.shape == (2, a[0] * b[0])
    assert not found.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, DOUBLE])
def test_the_dtype_stays(dtype: torch.dtype) -> None:
    x, a, b = (each.to(dtype) for each in (random(2, 6), random(4, 2, seed=1), random(5, 3, seed=2)))
    found = call(x, a, b, 2.0)
    assert found.dtype == dtype
    wanted = 2.0 * x.double() @ torch.kron(a.double(), b.double()).t()
    # Sums of 3 and of 2 products, each product, sum and the factor rounded once at most: half an epsilon of the terms.
    terms = 2.0 * x.double().abs() @ torch.kron(a.double(), b.double()).abs().t()
    assert ((found.double() - wanted).abs() <= 4 * torch.finfo(dtype).eps * terms).all()


@pytest.mark.parametrize(("a", "b"), [((2, 3), (4, 2)), ((4, 2), (2, 3)), ((1, 4), (3, 1))])
def test_gradients(a: tuple[int, int], b: tuple[int, int]) -> None:
    """In both orders of the two products."""
    operands = [random(2, a[1] * b[1]), random(*a, seed=1), random(*b, seed=2)]
    for each in operands:
        each.requires_grad_()
    for scale in (1.0, -0.5):
        assert torch.autograd.gradcheck(lambda x, p, q, s=scale: call(x, p, q, s), operands)


def test_a_frozen_factor_gets_no_gradient() -> None:
    x, a, b = random(2, 6), random(4, 2, seed=1), random(5, 3, seed=2).requires_grad_()
    call(x, a, b).sum().backward()
    assert x.grad is None
    assert a.grad is None
    assert b.grad is not None


def test_both_orders_are_taken() -> None:
    assert b_first((2, 64), (2, 64))
    assert not b_first((2, 64), (64, 2))
    for a, b in (((2, 8), (3, 9)), ((3, 8), (9, 2))):
        x, p, q = random(a[1] * b[1]), random(*a, seed=1), random(*b, seed=2)
        torch.testing.assert_close(call(x, p, q), x @ torch.kron(p, q).t(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_stay_in_their_row(bad: float) -> None:
    x, a, b = torch.ones(3, 6), torch.ones(4, 2), torch.ones(5, 3)
    x[1, 4] = bad
    found = call(x, a, b)
    assert found[[0, 2]].isfinite().all()
    assert (found[1].isnan() if math.isnan(bad) else found[1] == bad).all()
    a[0, 0] = bad  # one row of A: the first five outputs
    found = call(torch.ones(1, 6), a, b)[0]
    assert not found[:5].isfinite().any()
    assert found[5:].isfinite().all()


def test_the_scale_is_a_factor_and_one_is_none() -> None:
    x, a, b = random(2, 6), random(4, 2, seed=1), random(5, 3, seed=2)
    assert torch.equal(call(x, a, b), call(x, a, b, 1.0))
    assert torch.equal(call(x, a, b, 0.5), 0.5 * call(x, a, b))
    assert not call(x, a, b, 0.0).any()


@given(st.tuples(*[st.integers(0, 5)] * 4), st.sampled_from([(), (2,), (2, 0)]))
@settings(max_examples=30)
def test_the_shape_rule_agrees_with_the_reference(sizes: tuple[int, ...], rows: tuple[int, ...]) -> None:
    a1, a2, b1, b2 = sizes
    operands = torch.ones(*rows, a2 * b2), torch.ones(a1, a2), torch.ones(b1, b2)
    real, meta = kron_linear(*operands, 2.0), call(*[each.to("meta") for each in operands], 2.0)
    assert (real.shape, real.dtype) == (meta.shape, meta.dtype)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 7)}, "x has 7 features, a .* and b .* 6"),
        ({"a": torch.zeros(4)}, "must be matrices"),
        ({"b": torch.zeros(5, 3, 1)}, "must be matrices"),
        ({"a": torch.zeros(4, 2, dtype=DOUBLE)}, "of one floating dtype"),
        ({"b": torch.zeros(5, 3).half()}, "of one floating dtype"),
        ({name: torch.zeros(2, 6, dtype=torch.int64) for name in ("x", "a", "b")}, "of one floating dtype"),
    ],
)
def test_operands_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    operands: dict[str, Any] = {"x": torch.zeros(2, 6), "a": torch.zeros(4, 2), "b": torch.zeros(5, 3)}
    fake = ops.get("kron_linear").fake
    assert fake is not None
    assert fake(**operands).shape == (2, 20)
    with pytest.raises((ValueError, RuntimeError), match=message):
        fake(**{**operands, **change})


def test_multiply_accumulates_are_those_of_the_cheaper_order() -> None:
    macs = ops.get("kron_linear").macs
    # A [4, 2] and B [5, 3]: X Bᵀ takes 2·3·5 and A times it 4·2·5; the other order 4·2·3 and 4·3·5.
    assert products((4, 2), (5, 3), first_b=True) == 70
    assert products((4, 2), (5, 3), first_b=False) == 84
    assert macs({"x": (2, 7, 6), "a": (4, 2), "b": (5, 3)}) == 14 * 70
    assert macs({"x": (6,), "a": (4, 2), "b": (5, 3)}) == 70
    # 2048 · 2048 with the product formed; here A X takes 32·64·32, and times Bᵀ 32·32·64.
    assert macs({"x": (1, 2048), "a": (32, 64), "b": (64, 32)}) == 2 * 32 * 32 * 64
