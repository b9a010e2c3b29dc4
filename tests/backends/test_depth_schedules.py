"""A schedule of depths: which layers a token runs through, and what it then says."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.frontends.decoders import greedy
from tests.passes.sharing.models import step_of

import graphwright as gw
from graphwright.ir.text import print_program
from graphwright.ir.truncation import layers_of, truncated

PROMPTS = [[5, 17, 30, 44], [22, 71]]
EVERYWHERE = pytest.mark.parametrize("target", ["reference", "cpu"])


@functools.cache
def decoder(target: str, *, prepared: bool = False, kept: int | None = None) -> Any:
    """A decoder of four layers, or the first of them; prepared, its last one computes selected rows only."""
    step = step_of()
    if kept is not None:
        gw.TruncateDepth(layers=kept)(step)
    if prepared:
        gw.run_passes(step, [gw.PrepareDecoder(length=64)])
    return gw.optimize(step, target=target, verify=False)


def test_the_power_law_of_positions() -> None:
    schedule = gw.DepthSchedule(alpha=0.9, floor=5)
    assert [schedule.depth(12, place) for place in range(10)] == [12, 10, 9, 8, 7, 7, 6, 5, 5, 5]
    grouped = gw.DepthSchedule(alpha=0.9, floor=5, step=4)
    assert [grouped.depth(12, place) for place in range(8)] == [12, 12, 12, 8, 8, 8, 8, 8]
    assert gw.DepthSchedule().depth(12, 1000) == 12
    assert gw.DepthSchedule(alpha=0.5).depth(12, 1000) == 1


@EVERYWHERE
@pytest.mark.parametrize("prepared", [False, True])
def test_full_depth_is_ordinary_decoding(target: str, prepared: bool) -> None:
    made = decoder(target, prepared=prepared)
    plain = made.session(slots=2, capacity=24)
    scheduled = made.session(slots=2, capacity=24, depth=gw.DepthSchedule())
    assert greedy(scheduled, PROMPTS, [1, 0], 6) == greedy(plain, PROMPTS, [1, 0], 6)
    assert set(scheduled.depths.taken) == {4}


@EVERYWHERE
@pytest.mark.parametrize("prepared", [False, True])
def test_a_token_runs_the_first_layers_and_the_classifier(target: str, prepared: bool) -> None:
    """Held against a decoder of two layers that gets the same caches."""
    made, cut = decoder(target, prepared=prepared), decoder("reference", kept=2)
    session = made.session(slots=2, capacity=24, depth=gw.DepthSchedule(alpha=0.7, floor=2))
    plain, short = made.session(slots=2, capacity=24), cut.session(slots=2, capacity=24)
    slots, starts, first = torch.tensor([1, 0]), torch.zeros(2).long(), torch.zeros(2, 1).long()
    prompt = torch.tensor([[5, 17, 30], [22, 71, 9]])
    for each in (session, plain, short):
        each.step(prompt, slots, starts, first + 2)
    depths = []
    for place, token in enumerate([4, 8, 15]):
        given = (torch.full((2, 1), token), slots, starts + 3 + place, first)
        found, whole, few = (each.step(*given).clone() for each in (session, plain, short))
        depths.append(session.depths.last[-1])
        torch.testing.assert_close(found, whole if depths[-1] == 4 else few, rtol=0, atol=1e-5)
        assert not torch.allclose(whole, few, atol=1e-2)
    assert depths == [4, 2, 2]


@EVERYWHERE
def test_rows_have_depths_of_their_own_and_tokens_are_taken_back(target: str) -> None:
    session = decoder(target, prepared=True).session(slots=2, capacity=24, depth=gw.DepthSchedule(alpha=0.5))
    zero = torch.zeros(1, 1).long()
    session.step(torch.tensor([[3, 4, 5]]), torch.tensor([0]), torch.tensor([0]), zero)
    for start in (3, 4):
        session.step(torch.tensor([[6]]), torch.tensor([0]), torch.tensor([start]), zero)
    session.step(torch.tensor([[3, 4]]), torch.tensor([1]), torch.tensor([0]), zero)
    both = torch.tensor([[6], [7]])
    found = session.step(both, torch.tensor([0, 1]), torch.tensor([5, 2]), torch.zeros(2, 1).long()).clone()
    assert session.depths.last == [1, 4]
    assert session.depths.taken == {4: 4, 2: 1, 1: 1}
    alone = decoder(target, prepared=True).session(slots=1, capacity=24)
    alone.step(torch.tensor([[3, 4]]), torch.tensor([0]), torch.tensor([0]), zero)
    wanted = alone.step(torch.tensor([[7]]), torch.tensor([0]), torch.tensor([2]), zero)
    torch.testing.assert_close(found[1:], wanted, rtol=0, atol=1e-5)
    session.copy(0, 1, 4)
    session.step(torch.tensor([[6]]), torch.tensor([1]), torch.tensor([4]), zero)  # a token taken back
    assert session.depths.last == [2]


def test_generation_at_falling_depth() -> None:
    schedule = gw.DepthSchedule(alpha=0.6, floor=2)
    given: dict[str, Any] = {"max_new_tokens": 6, "stop_tokens": []}
    answers = []
    for target in ("reference", "cpu"):
        made = decoder(target, prepared=True)
        cache = made.prompt_cache(slots=2, capacity=24, depth=schedule)
        answers.append(made.generate(PROMPTS, cache=cache, **given).tokens)
        assert set(cache.session.depths.taken) == {4, 2}
    assert answers[0] == answers[1] != decoder("cpu", prepared=True).generate(PROMPTS, **given).tokens


def test_a_truncated_step_keeps_weights_and_names() -> None:
    step = step_of()
    gw.run_passes(step, [gw.PrepareDecoder(length=64)])
    before = print_program(step)
    small = truncated(step, layers_of(step), 3)
    assert print_program(step) == before
    assert [str(node.target) for node in small.inputs][4:] == [
        f"{kind}_{at}" for kind in ("keys", "values") for at in range(3)
    ]
    whole = step.tensors()
    assert all(tensor is whole[name] for name, tensor in small.tensors().items())
    assert len(small.tensors()) < len(whole)


def test_what_cannot_run_at_less_depth_says_so(tmp_path: Path) -> None:
    made, schedule = decoder("cpu", prepared=True), gw.DepthSchedule(alpha=0.5)
    with pytest.raises(gw.InputError, match="give pipeline or depth"):
        made.prompt_cache(pipeline=True, depth=schedule)
    made.save_packed(tmp_path / "packed")
    packed: Any = gw.load_packed(tmp_path / "packed")
    with pytest.raises(gw.ProgramError, match="values"):
        packed.session(depth=schedule)
    one: Any = gw.optimize(step_of(1), target="reference", verify=False)
    with pytest.raises(gw.ProgramError, match="no repeated layers"):
        one.session(depth=schedule)
    on_onnx: Any = gw.optimize(step_of(2), target="onnx", verify=False)
    with pytest.raises(gw.BackendError, match="through all layers"):
        on_onnx.session(depth=schedule)


@pytest.mark.parametrize(
    "options", [{"alpha": 0.0}, {"alpha": 1.5}, {"alpha": float("nan")}, {"floor": 0}, {"step": 0}]
)
def test_wrong_schedules(options: dict[str, float]) -> None:
    with pytest.raises(gw.InputError, match="DepthSchedule"):
        gw.DepthSchedule(**options)
