"""Schedules that rise, and programs that are pruned by them while they train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graphwright as gw

from .models import batches, decoder, ids, names


def test_the_cubic_schedule_is_the_published_one() -> None:
    schedule = gw.CubicSchedule(final=0.9, steps=100, initial=0.1, start=20, every=10)
    assert schedule.at(0) == schedule.at(19) == 0.0
    for step in (20, 30, 70, 110):
        assert schedule.at(step) == pytest.approx(0.9 + (0.1 - 0.9) * (1 - (step - 20) / 100) ** 3, abs=1e-15)
    assert schedule.at(20) == pytest.approx(0.1)
    assert schedule.at(39) == schedule.at(30)
    assert schedule.at(120) == schedule.at(10**6) == 0.9
    assert schedule.last == 120
    uneven = gw.CubicSchedule(final=0.5, steps=25, every=10)
    assert uneven.at(24) == uneven.at(20) < uneven.at(25) == 0.5
    steps = [schedule.at(step) for step in range(200)]
    assert steps == sorted(steps)


def test_the_ladder_has_the_published_levels() -> None:
    schedule = gw.LadderSchedule(every=3, start=2)
    assert [schedule.at(step) for step in range(20)] == (
        [0.0] * 2 + [0.5] * 3 + [0.67] * 3 + [0.75] * 3 + [0.8] * 3 + [0.86] * 3 + [0.9] * 3
    )
    assert schedule.last == 17
    assert schedule.at(schedule.last) == 0.9


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: gw.CubicSchedule(final=0.3, steps=10, initial=0.5), "goes down from 0.5 to 0.3"),
        (lambda: gw.CubicSchedule(final=1.0, steps=10), "must be at least 0 and below 1, not 1.0"),
        (lambda: gw.CubicSchedule(final=0.5, steps=0), "must be an integer, 1 or more, not 0"),
        (lambda: gw.LadderSchedule(every=1, levels=(0.5, 0.4)), "goes down from 0.5 to 0.4"),
        (lambda: gw.LadderSchedule(every=1, levels=(0.5, 0.5)), "has 0.5 twice"),
        (lambda: gw.LadderSchedule(every=1, levels=()), "has no levels"),
        (lambda: gw.LadderSchedule(every=0), "must be an integer, 1 or more"),
    ],
)
def test_schedules_that_do_not_serve(make: Any, words: str) -> None:
    with pytest.raises(gw.InputError, match=words):
        make()


def train(program: gw.Program, optimizer: torch.optim.Optimizer, seed: int) -> None:
    tokens = ids(seed)["input_ids"]
    logits = program(input_ids=tokens)["logits"]
    nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    optimizer.step()
    optimizer.zero_grad()


def zeros(program: gw.Program) -> dict[str, torch.Tensor]:
    return {name: program.tensor(name).detach() == 0 for name in names(program)}


@pytest.mark.parametrize("method", ["magnitude", "sparsegpt"])
def test_masks_grow_while_the_optimiser_goes_on(method: str) -> None:
    program = decoder().clone(copy_weights=True)
    optimizer = torch.optim.AdamW(program.parameters(), lr=0.01, weight_decay=0.1)
    known = {name: id(each) for name, each in program.named_parameters()}
    data = batches(6) if method == "sparsegpt" else None
    item = gw.PruneLinears(method=method, calibration=data)
    pruning = gw.PruneGradually(program, gw.LadderSchedule(every=2, levels=(0.5, 0.67, 0.8), start=1), item)
    pruned_at: list[int] = []
    before: dict[str, torch.Tensor] = {}
    for step in range(7):
        if pruning.step(step):
            pruned_at.append(step)
        now = {name: program.tensor(f"{name}_mask") for name in names(program)}
        for name, mask in before.items():
            assert not bool((now[name] & ~mask).any())
        before = now
        for mask in now.values():
            assert float((~mask).float().mean()) == pytest.approx(pruning.sparsity, abs=0.01)
        train(program, optimizer, step)
    assert pruned_at == [1, 3, 5]
    assert {name: id(each) for name, each in program.named_parameters()} == known
    assert not pruning.step(100)
    logits = program(**ids())["logits"]
    pruning.finish()
    assert torch.equal(program(**ids())["logits"], logits)
    for name, gone in zeros(program).items():
        assert torch.equal(gone, ~before[name])
    assert all(row.intact for row in gw.describe_sparsity(program).linears if row.pattern)
    assert gw.QuantizeLinears(bits=4, group_size=16)(program)
    assert all(entry.sparsity >= 0.79 for entry in gw.pruned_weights(program).values())


def test_a_schedule_that_goes_down_is_refused() -> None:
    class Falling(gw.SparsitySchedule):
        last = 3

        def at(self, step: int) -> float:
            return (0.5, 0.6, 0.4, 0.6)[step]

    program = decoder().clone(copy_weights=True)
    pruning = gw.PruneGradually(program, Falling())
    assert pruning.step(0)
    assert pruning.step(1)
    before = zeros(program)
    with pytest.raises(gw.InputError, match=r"goes down from 0.6 to 0.4 at step 2"):
        pruning.step(2)
    assert all(torch.equal(gone, zeros(program)[name]) for name, gone in before.items())
    assert gw.describe_sparsity(program).linears[0].held


def test_a_saved_program_goes_on(tmp_path: Path) -> None:
    program = decoder().clone(copy_weights=True)
    schedule = gw.LadderSchedule(every=1, levels=(0.5, 0.75))
    assert gw.PruneGradually(program, schedule).step(0)
    program.save(tmp_path / "half")
    loaded = gw.Program.load(tmp_path / "half")
    gone = zeros(loaded)
    pruning = gw.PruneGradually(loaded, schedule)
    assert pruning.sparsity == pytest.approx(0.5, abs=1e-3)
    assert not pruning.step(0)
    assert pruning.step(1)
    for name, was in gone.items():
        assert bool((loaded.tensor(name)[was] == 0).all())


def test_patterns_with_a_sparsity_of_their_own_are_refused() -> None:
    with pytest.raises(gw.InputError, match="2:4 has a sparsity of 0.5"):
        gw.PruneGradually(decoder(), gw.LadderSchedule(every=1), gw.PruneLinears(pattern="2:4"))


def test_a_failed_pruning_leaves_the_masks_held() -> None:
    program = decoder().clone(copy_weights=True)
    item = gw.PruneLinears(overrides={"layers.0.up": {"sparsity": 0.1}})
    pruning = gw.PruneGradually(program, gw.LadderSchedule(every=1), item)
    assert pruning.step(0)
    with torch.no_grad():
        program.tensor("layers.1.up.weight")[0, program.tensor("layers.1.up.weight_mask")[0]] = torch.nan
    with pytest.raises(gw.InputError, match="NaN"):
        pruning.step(1)
