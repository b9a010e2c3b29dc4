"""A schedule of depths: which layers a token runs through, and what it then says."""

from __future__ import annotations

import pytest
import torch
from tests.frontends.decoders import greedy
from tests.passes.sharing.models import step_of

import graphwright as gw
from graphwright.backends.reference import ReferenceBackend
from graphwright.backends.reference.depth import DepthSchedule, ScheduledSession

PROMPTS = [[5, 17, 30, 44], [22, 71]]


def test_the_power_law_of_positions() -> None:
    schedule = DepthSchedule(alpha=0.9, floor=5)
    assert [schedule.depth(12, place) for place in range(10)] == [12, 10, 9, 8, 7, 7, 6, 5, 5, 5]
    grouped = DepthSchedule(alpha=0.9, floor=5, step=4)
    assert [grouped.depth(12, place) for place in range(8)] == [12, 12, 12, 8, 8, 8, 8, 8]
    assert DepthSchedule().depth(12, 1000) == 12
    assert DepthSchedule(alpha=0.5).depth(12, 1000) == 1


def test_full_depth_is_ordinary_decoding() -> None:
    step = step_of()
    plain = ReferenceBackend().lower(step).session(slots=2, capacity=24)
    scheduled = ScheduledSession(step, DepthSchedule(), slots=2, capacity=24)
    assert greedy(scheduled, PROMPTS, [1, 0], 6) == greedy(plain, PROMPTS, [1, 0], 6)
    assert set(scheduled.depths) == {4}


def test_a_token_runs_the_first_layers_and_the_classifier() -> None:
    """Held against a truncated program that gets the same caches."""
    step = step_of()
    session = ScheduledSession(step, DepthSchedule(alpha=0.7, floor=2), slots=2, capacity=24)
    plain = ReferenceBackend().lower(step).session(slots=2, capacity=24)
    small = step.clone()
    gw.TruncateDepth(layers=2)(small)
    short = ReferenceBackend().lower(small).session(slots=2, capacity=24)
    slots, starts, first = torch.tensor([1, 0]), torch.zeros(2).long(), torch.zeros(2, 1).long()
    prompt = torch.tensor([[5, 17, 30], [22, 71, 9]])
    for each in (session, plain, short):
        each.step(prompt, slots, starts, first + 2)
    depths = []
    for place, token in enumerate([4, 8, 15]):
        given = (torch.full((2, 1), token), slots, starts + 3 + place, first)
        found, whole, cut = (each.step(*given).clone() for each in (session, plain, short))
        depths.append(session.depths[-1])
        wanted = whole if depths[-1] == 4 else cut
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
        assert not torch.allclose(whole, cut, atol=1e-2)
    assert depths == [4, 2, 2]


def test_rows_have_depths_of_their_own_and_tokens_are_taken_back() -> None:
    session = ScheduledSession(step_of(), DepthSchedule(alpha=0.5), slots=2, capacity=24)
    zero = torch.zeros(1, 1).long()
    session.step(torch.tensor([[3, 4, 5]]), torch.tensor([0]), torch.tensor([0]), zero)
    for start in (3, 4):
        session.step(torch.tensor([[6]]), torch.tensor([0]), torch.tensor([start]), zero)
    session.step(torch.tensor([[3, 4]]), torch.tensor([1]), torch.tensor([0]), zero)
    both = torch.tensor([[6], [7]])
    session.step(both, torch.tensor([0, 1]), torch.tensor([5, 2]), torch.zeros(2, 1).long())
    assert session.depths == [4, 4, 2, 4, 1, 4]
    session.step(torch.tensor([[6]]), torch.tensor([0]), torch.tensor([4]), zero)  # a token taken back
    assert session.depths[-1] == 2


@pytest.mark.parametrize(
    "options", [{"alpha": 0.0}, {"alpha": 1.5}, {"alpha": float("nan")}, {"floor": 0}, {"step": 0}]
)
def test_wrong_schedules(options: dict[str, float]) -> None:
    with pytest.raises(gw.InputError, match="DepthSchedule"):
        DepthSchedule(**options)


def test_prepared_steps_are_refused() -> None:
    step = step_of(2)
    gw.run_passes(step, [gw.PrepareDecoder(length=64)])
    with pytest.raises(gw.InputError, match="before PrepareDecoder"):
        ScheduledSession(step, DepthSchedule(), slots=1, capacity=8)
