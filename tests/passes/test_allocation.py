"""The allocation is exact: no other choice within the budget has a smaller sum."""

from __future__ import annotations

import functools
import itertools
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import graphwright as gw
from graphwright.passes.quantization.allocation import solve

pytest.importorskip("scipy")


def brute_force(costs: list[list[float]], sizes: list[list[int]], budget: int) -> float:
    """The least sum of costs over all choices that fit."""
    return min(
        sum(row[index] for row, index in zip(costs, choice, strict=True))
        for choice in itertools.product(*(range(len(row)) for row in costs))
        if sum(row[index] for row, index in zip(sizes, choice, strict=True)) <= budget
    )


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[list[float]], list[list[int]], int]:
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    number = st.one_of(st.integers(-3, 3).map(float), st.floats(-1e3, 1e3), st.floats(0, 1e-3))
    unit = draw(st.sampled_from([1, 16, 1000]))
    costs = [[draw(number) for _ in range(columns)] for _ in range(rows)]
    sizes = [[unit * draw(st.integers(0, 10 ** draw(st.integers(1, 6)))) for _ in range(columns)] for _ in range(rows)]
    least, most = sum(map(min, sizes)), sum(map(max, sizes))
    return costs, sizes, draw(st.integers(least, most))


@settings(max_examples=60)
@given(problems())
def test_as_good_as_brute_force(problem: tuple[list[list[float]], list[list[int]], int]) -> None:
    costs, sizes, budget = problem
    choice = solve(costs, sizes, budget)
    assert sum(row[index] for row, index in zip(sizes, choice, strict=True)) <= budget
    found = sum(row[index] for row, index in zip(costs, choice, strict=True))
    spread = sum(max(row) - min(row) for row in costs)
    assert found <= brute_force(costs, sizes, budget) + 1e-9 * spread + 1e-12


@functools.cache
def table() -> gw.Sensitivities:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 64), nn.Linear(64, 32))
    candidates = [{"bits": bits, "group_size": 16} for bits in (2, 3, 4, 8)]
    return gw.sensitivities(gw.trace(model, torch.randn(4, 32)), candidates=[*candidates, None], measure="sqnr")


def test_an_allocation_fits_the_pass() -> None:
    found = gw.allocate(table(), budget_bits=6.0)
    assert found.bits <= 6.0
    assert found.bytes == sum(row.stored[choice] for row, choice in zip(table().linears, found.choices, strict=True))
    assert set(found.overrides) == {"0.weight", "1.weight", "2.weight"}
    assert found.loss == pytest.approx(
        sum(row.values[choice] for row, choice in zip(table().linears, found.choices, strict=True))
    )
    assert "bits per weight" in str(found)
    assert all(name in str(found) for name in found.overrides)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 64), nn.Linear(64, 32))
    x = torch.randn(4, 32)
    rough = gw.sensitivities(
        gw.trace(model, x), candidates=[{"bits": 4, "group_size": 16}, {"bits": 8, "group_size": 16}], measure="sqnr"
    )
    mixed = gw.allocate(rough, budget_bits=7.0)
    small = gw.optimize(model, [gw.QuantizeLinears(group_size=16, overrides=mixed.overrides)], example_inputs=x)
    packed = [tensor for name, tensor in small.tensors().items() if "bias" not in name]
    assert sum(tensor.numel() * tensor.element_size() for tensor in packed) == mixed.bytes


def test_more_bytes_never_lose_more() -> None:
    losses = [gw.allocate(table(), budget_bits=bits).loss for bits in (3.0, 4.0, 5.0, 8.0, 9.0, 32.0)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == 0.0


def test_uniform_sensitivities_tell_sizes_only() -> None:
    flat = table().uniform()
    for row in flat.linears:
        for mine, first in zip(row.values, flat.linears[0].values, strict=True):
            assert mine / row.parameters == pytest.approx(first / flat.linears[0].parameters)
    assert flat.total(1) == pytest.approx(table().total(1))


def test_what_cannot_be_says_the_least_budget() -> None:
    with pytest.raises(gw.InputError, match="budget_bytes=(\\d+)") as caught:
        gw.allocate(table(), budget_bits=1.0)
    least = int(str(caught.value).split("budget_bytes=")[1].split(",")[0])
    assert gw.allocate(table(), budget_bytes=least).bytes == least
    with pytest.raises(gw.InputError, match="fits"):
        gw.allocate(table(), budget_bytes=least - 1)
    bits = float(str(caught.value).split("budget_bits=")[1])
    assert gw.allocate(table(), budget_bits=bits).bytes == least


@pytest.mark.parametrize(
    "options", [{}, {"budget_bits": 3, "budget_bytes": 3}, {"budget_bits": 0}, {"budget_bits": "3"}]
)
def test_bad_budgets(options: dict[str, float]) -> None:
    with pytest.raises(gw.InputError, match="allocate"):
        gw.allocate(table(), **options)


def test_without_scipy_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(gw.InputError, match="graphwright\\[search\\]"):
        gw.allocate(table(), budget_bits=6.0)
