"""Rotation, gated activation, softmax and Kronecker products against their references, with gradients."""

from __future__ import annotations

import math

import pytest
import torch
from tests.backends.triton.oracle import DTYPES, check, gradients, random, same_where_not_finite

from graphwright.backends.triton.kernels.kron_linear import kron_linear
from graphwright.backends.triton.kernels.pointwise import gated_activation, softmax
from graphwright.backends.triton.kernels.rotary import rotary_embedding
from graphwright.ir.ops.activation import ACTIVATIONS
from graphwright.ir.ops.activation import gated_activation as gated_reference
from graphwright.ir.ops.kronecker import b_first
from graphwright.ir.ops.kronecker import kron_linear as kron_reference
from graphwright.ir.ops.position import rotary_embedding as rotary_reference

# (batch, heads, length, head dim, rotated, rows of the table)
ROTARY = [(1, 1, 1, 2, 2, 1), (2, 3, 5, 8, 8, 2), (2, 9, 2, 14, 6, 1), (1, 2, 3, 64, 64, 1), (0, 2, 3, 4, 4, 1)]
KRON = [((1, 1), (1, 1)), ((2, 3), (4, 2)), ((17, 9), (33, 7)), ((9, 17), (7, 33)), ((3, 40), (40, 3))]


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("sizes", ROTARY, ids=str)
def test_rotary(sizes: tuple[int, ...], interleaved: bool) -> None:
    batch, heads, length, width, rotated, tables = sizes
    for dtype in DTYPES:
        x, cos, sin = random(batch, heads, length, width, dtype=dtype), random(tables, length, rotated), random(1, 1, 1)
        sin = random(tables, length, rotated, seed=1)
        wanted = rotary_reference(x.double(), cos.double(), sin.double(), interleaved)
        check(rotary_embedding(x, cos, sin, interleaved), wanted, dtype)
    swapped = random(batch, length, heads, width).transpose(1, 2)
    wanted = rotary_reference(swapped.double(), cos.double(), sin.double(), interleaved)
    check(rotary_embedding(swapped, cos, sin, interleaved), wanted)


@pytest.mark.parametrize("interleaved", [False, True])
def test_gradient_of_rotary(interleaved: bool) -> None:
    x, cos, sin, slope = random(2, 3, 4, 10), random(1, 4, 6), random(1, 4, 6, seed=1), random(2, 3, 4, 10, seed=2)
    (found,) = gradients(lambda x: rotary_embedding(x, cos, sin, interleaved), (x,), slope)
    (wanted,) = gradients(
        lambda x: rotary_reference(x, cos.double(), sin.double(), interleaved), (x.double(),), slope.double()
    )
    check(found, wanted)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated_activation(activation: str) -> None:
    for dtype, shape in zip(DTYPES, ((2, 3, 7), (1, 1030), (0, 5))):
        both = random(*shape[:-1], 2 * shape[-1], dtype=dtype)
        gate, up = both.split(shape[-1], dim=-1)  # as a merged linear leaves them
        wanted = gated_reference(gate.double(), up.double(), activation)
        check(gated_activation(gate, up, activation), wanted, dtype)
    gate, up, slope = random(3, 9), random(3, 9, seed=1), random(3, 9, seed=2)
    found = gradients(lambda a, b: gated_activation(a, b, activation), (gate, up), slope)
    wide = gradients(lambda a, b: gated_reference(a, b, activation), (gate.double(), up.double()), slope.double())
    for a, b in zip(found, wide, strict=True):
        check(a, b, roundings=8)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_are_not_finite(bad: float) -> None:
    gate, up = random(3, 9), random(3, 9, seed=1)
    gate[1, 2] = bad
    for activation in ACTIVATIONS:
        wanted = gated_reference(gate.double(), up.double(), activation)
        same_where_not_finite(gated_activation(gate, up, activation), wanted)
    same_where_not_finite(softmax(gate), torch.softmax(gate, -1))


@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (2, 2, 129), (0, 4)], ids=str)
def test_softmax(shape: tuple[int, ...]) -> None:
    for dtype in DTYPES:
        x = random(*shape, dtype=dtype)
        check(softmax(x), torch.softmax(x.double(), -1), dtype)
    hidden = torch.tensor([[0.0, -math.inf, 1.0], [-math.inf] * 3])
    same_where_not_finite(softmax(hidden), torch.softmax(hidden, -1))


@pytest.mark.parametrize(("a", "b"), KRON)
def test_kron_linear(a: tuple[int, int], b: tuple[int, int]) -> None:
    for dtype, rows in zip(DTYPES, (3, 1, 0)):
        x, left, right = random(rows, a[1] * b[1]).to(dtype), random(*a).to(dtype), random(*b, seed=1).to(dtype)
        wanted = kron_reference(x.double(), left.double(), right.double(), -0.3)
        check(kron_linear(x, left, right, -0.3), wanted, dtype)


def test_both_orders_are_among_the_shapes() -> None:
    assert {b_first(a, b) for a, b in KRON} == {True, False}


@pytest.mark.parametrize(("a", "b"), [((5, 3), (4, 7)), ((3, 20), (20, 3))])
def test_gradients_of_kron_linear(a: tuple[int, int], b: tuple[int, int]) -> None:
    x, left, right = random(2, 2, a[1] * b[1]), random(*a), random(*b, seed=1)
    slope = random(2, 2, a[0] * b[0], seed=2)
    found = gradients(lambda x, a, b: kron_linear(x, a, b, 0.5), (x, left, right), slope)
    wide = [each.double() for each in (x, left, right)]
    for one, other in zip(found, gradients(lambda x, a, b: kron_reference(x, a, b, 0.5), wide, slope.double())):
        check(one, other, roundings=8)
