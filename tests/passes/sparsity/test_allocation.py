"""Sparsities of single linears under one for all together."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import graphwright as gw
from graphwright.passes.sparsity.allocation import by_loss, erk, ranked

from .models import batches, decoder, names, pruned

SHAPES = {"square": (64, 64), "wide": (256, 64), "small": (8, 8)}


def test_erk_keeps_the_budget_and_the_proportions() -> None:
    found = erk(SHAPES, 0.8)
    sizes = {name: out * into for name, (out, into) in SHAPES.items()}
    kept = {name: (1 - found[name]) * sizes[name] for name in SHAPES}
    assert sum(kept.values()) == pytest.approx(0.2 * sum(sizes.values()))
    parts = {name: (1 - found[name]) / (sum(SHAPES[name]) / sizes[name]) for name in SHAPES}
    assert parts["square"] == pytest.approx(parts["wide"])
    assert found["small"] == 0.0  # it would keep more than all
    assert found["square"] < found["wide"]
    assert erk(SHAPES, 0.0) == pytest.approx(dict.fromkeys(SHAPES, 0.0))


def test_weights_compared_with_each_other() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = {"low": torch.rand(10, 10, generator=generator), "high": 0.5 + torch.rand(20, 10, generator=generator)}
    found = ranked(scores, 0.5)
    assert found["low"] * 100 + found["high"] * 200 == pytest.approx(150)
    order = torch.cat([each.flatten() for each in scores.values()]).sort().values
    assert found["low"] == pytest.approx(float((scores["low"] <= order[149]).float().mean()))
    equal = ranked({"a": torch.ones(10), "b": torch.ones(10)}, 0.4)
    assert equal == {"a": 0.8, "b": 0.0}
    assert ranked(scores, 0.0) == {"low": 0.0, "high": 0.0}


def test_the_least_sum_of_costs() -> None:
    levels = (0.2, 0.5, 0.8)
    costs = {"a": [0.0, 1.0, 10.0], "b": [0.0, 2.5, 3.0], "c": [0.0, 0.1, 5.0]}
    sizes = {"a": 100, "b": 100, "c": 200}
    found = by_loss(sizes, levels, costs.__getitem__, 0.5)
    best = min(
        (sum(costs[name][index] for name, index in zip(sizes, chosen, strict=True)), chosen)
        for chosen in itertools.product(range(3), repeat=3)
        if sum(levels[index] * size for index, size in zip(chosen, sizes.values(), strict=True)) >= 200
    )
    assert [levels.index(level) for level in found.values()] == list(best[1])


def overall(program: gw.Program) -> float:
    entries = gw.pruned_weights(program)
    sizes = {name: program.tensor(name).numel() for name in entries}
    return sum(entry.sparsity * sizes[name] for name, entry in entries.items()) / sum(sizes.values())


@pytest.mark.parametrize("allocation", ["uniform", "erk", "global"])
@pytest.mark.parametrize("pattern", ["unstructured", "4x1"])
def test_the_budget_is_kept(allocation: str, pattern: str) -> None:
    program = pruned(sparsity=0.6, allocation=allocation, pattern=pattern)
    assert overall(program) == pytest.approx(0.6, abs=2e-3)
    levels = {round(entry.sparsity, 2) for entry in gw.pruned_weights(program).values()}
    assert (len(levels) == 1) == (allocation == "uniform")


def test_global_magnitude_is_one_threshold() -> None:
    program, source = pruned(sparsity=0.6, allocation="global"), decoder()
    gone = torch.cat([source.tensor(name)[program.tensor(name) == 0].abs() for name in names(program)])
    kept = torch.cat([source.tensor(name)[program.tensor(name) != 0].abs() for name in names(program)])
    assert gone.max() < kept.min()


@pytest.mark.parametrize("measure", ["fisher", "output"])
def test_sparsities_by_what_they_cost(measure: str) -> None:
    source = decoder().clone(copy_weights=True)
    with torch.no_grad():  # one that hardly matters: nothing but its few largest columns counts
        source.tensor("layers.1.up.weight")[:, 6:] *= 1e-3
    way = gw.LossDriven(measure=measure, levels=5)
    program = source.clone()
    assert gw.PruneLinears(sparsity=0.5, method="wanda", allocation=way, calibration=batches(4))(program)
    assert 0.499 <= overall(program) <= 0.52
    entries = gw.pruned_weights(program)
    assert entries["layers.1.up.weight"].sparsity == pytest.approx(0.7, abs=0.02)
    assert all(0.28 <= entry.sparsity <= 0.72 for entry in entries.values())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"measure": "taste"}, "must be one of 'fisher', 'output'"),
        ({"spread": 0}, "must be between 0 and 1"),
        ({"levels": 4}, "must be an odd number from 3 on"),
    ],
)
def test_options_that_do_not_serve(options: dict[str, Any], words: str) -> None:
    with pytest.raises(gw.InputError, match=words):
        gw.LossDriven(**options)
