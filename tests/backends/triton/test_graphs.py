"""Recorded steps: their bookkeeping, on a stand-in for CUDA graphs that runs a step again where a GPU replays it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from graphwright.backends.triton import graphs
from graphwright.backends.triton.graphs import StepGraphs

CPU = torch.device("cpu")


class Recording:
    """A CUDA graph that keeps what was called while it recorded, with the tensors that it was called with."""

    current: Recording | None = None

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def pool(self) -> object:
        return "pool"

    def replay(self) -> None:
        for step, given, output in self.calls:
            output.copy_(step(*given))


class Stream:
    def __init__(self, device: object = None) -> None: ...

    def wait_stream(self, other: object) -> None: ...


@contextlib.contextmanager
def _recording(graph: Recording, pool: object = None) -> Iterator[None]:
    Recording.current = graph
    yield
    Recording.current = None


@pytest.fixture(autouse=True)
def _stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recording)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "graph", _recording)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())


class Step:
    """Doubles tokens; knows how often it ran, and whether it was recorded."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, tokens: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        self.runs += 1
        output = tokens * 2 + starts
        if Recording.current is not None:
            Recording.current.calls.append((lambda *given: given[0] * 2 + given[1], (tokens, starts), output))
        return output


def run(steps: StepGraphs, *tokens: int, start: int = 0) -> list[int]:
    return [int(value) for value in steps.run(torch.tensor([list(tokens)]), torch.tensor([start]))[0]]


def test_a_step_is_recorded_once_for_each_shape_and_takes_new_inputs() -> None:
    step = Step()
    steps = StepGraphs(step, CPU)
    assert run(steps, 3) == [6]
    assert step.runs == 3  # twice before the recording, and in it
    assert run(steps, 5, start=1) == [11]
    assert run(steps, 7, start=2) == [16]
    assert step.runs == 3
    assert run(steps, 1, 2) == [2, 4]
    assert step.runs == 6
    assert run(steps, 9) == [18]
    assert step.runs == 6


def test_the_callers_tensors_are_not_the_recordings() -> None:
    steps = StepGraphs(Step(), CPU)
    tokens = torch.tensor([[4]])
    steps.run(tokens, torch.tensor([0]))
    tokens.fill_(100)
    assert run(steps, 5) == [10]
    assert int(tokens) == 100


def test_long_steps_are_not_recorded() -> None:
    step = Step()
    steps = StepGraphs(step, CPU)
    for _ in range(2):
        assert run(steps, *range(graphs.LONGEST + 1))[:3] == [0, 2, 4]
    assert step.runs == 2


def test_the_shape_that_was_used_least_recently_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "_MOST", 2)
    step = Step()
    steps = StepGraphs(step, CPU)
    run(steps, 1)
    run(steps, 1, 1)
    run(steps, 1)
    run(steps, 1, 1, 1)  # instead of two tokens
    runs = step.runs
    run(steps, 1)
    run(steps, 1, 1, 1)
    assert step.runs == runs
    run(steps, 1, 1)
    assert step.runs == runs + 3
