"""Decoders on the executor: the tokens that transformers gives, for every family and every kind of cache."""

from __future__ import annotations

import functools
import threading
import time
from typing import Any

import pytest
import torch
from tests.frontends.decoders import FAMILIES, generate, greedy, traced

import graphwright as gw
from graphwright.backends.reference.session import ReferenceSession
from graphwright.backends.session import StepCancelled
from graphwright.ir.errors import InputError

pytest.importorskip("transformers")
native = pytest.importorskip("graphwright.backends.cpu._native")

PROMPTS = [[5, 17, 30, 44, 3, 61, 80, 12, 9], [22, 71, 8, 90], [33, 2, 64, 19, 77, 50]]
COUNT = 9


@functools.cache
def expected(name: str) -> list[list[int]]:
    return generate(traced(name)[0], PROMPTS, COUNT)


@functools.cache
def lowered(name: str, *, fused: bool = True) -> Any:
    return gw.optimize(traced(name)[1], [gw.Cleanup(), gw.FuseAll()] if fused else [], target="cpu", verify=False)


def _session(model: Any, **options: Any) -> Any:
    return model._executable.session(**options)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_decodes_like_transformers(name: str, fused: bool) -> None:
    session = _session(lowered(name, fused=fused), slots=5, capacity=20)
    assert greedy(session, PROMPTS, [3, 0, 4], COUNT) == expected(name)


def _logits(session: Any, tokens: torch.Tensor, cuts: list[int]) -> torch.Tensor:
    """Of every token, taken in pieces, in slot 1."""
    found, start = [], 0
    for length in cuts:
        rows = torch.arange(length).unsqueeze(0)
        piece = tokens[:, start : start + length]
        found.append(session.step(piece, torch.tensor([1]), torch.tensor([start]), rows).clone())
        start += length
    return torch.cat(found, 1)


@pytest.mark.parametrize("cuts", [[16], [1] * 16, [5, 1, 1, 7, 2], [9, 7]])
@pytest.mark.parametrize("cache", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "bloom", "gpt-neox"])
def test_logits_agree_with_the_reference(name: str, cache: str, cuts: list[int]) -> None:
    tokens = torch.randint(0, 97, (1, 16), generator=torch.Generator().manual_seed(3))
    wanted = _logits(ReferenceSession(traced(name)[1], slots=2, capacity=16), tokens, [16])
    found = _logits(_session(lowered(name), slots=2, capacity=16, cache=cache), tokens, cuts)
    # Of one rounding of keys and values, through a few layers of random weights.
    limit = {"float32": 2e-5, "bfloat16": 2e-2, "int8": 4e-2}[cache]
    assert float((found - wanted).norm() / wanted.norm()) < limit


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_results_do_not_depend_on_threads(name: str) -> None:
    tokens = torch.randint(0, 97, (1, 16), generator=torch.Generator().manual_seed(4))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(_logits(_session(lowered(name), slots=2, capacity=16), tokens, [7, 1, 8]))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(each, found[0]) for each in found)


def test_sessions_on_several_threads_at_once() -> None:
    model = lowered("llama")
    prompts = [[index + 2, 3 * index + 1, 7, index] for index in range(4)]
    wanted = [greedy(_session(model, slots=1, capacity=20), [prompt], [0], COUNT) for prompt in prompts]
    found: list[Any] = [None] * len(prompts)

    def work(index: int) -> None:
        session = _session(model, slots=1, capacity=20)
        for _ in range(3):
            found[index] = greedy(session, [prompts[index]], [0], COUNT)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == wanted


def test_copies_a_slot() -> None:
    tokens = torch.randint(0, 97, (1, 12), generator=torch.Generator().manual_seed(5))
    for cache in ("float32", "bfloat16", "int8"):
        session = _session(lowered("llama"), slots=3, capacity=16, cache=cache)
        wanted = _logits(session, tokens, [8, 4])[:, 8:]
        session.copy(1, 2, 8)
        rows = torch.arange(4).unsqueeze(0)
        found = session.step(tokens[:, 8:], torch.tensor([2]), torch.tensor([8]), rows)
        assert torch.equal(found, wanted)


def test_a_step_plans_its_memory_once() -> None:
    session = _session(lowered("llama"), slots=1, capacity=64)
    one, zero = torch.tensor([[3]]), torch.tensor([0])
    session.step(torch.tensor([[1, 2, 3, 4]]), zero, zero, torch.tensor([[3]]))
    for start in range(4, 40):
        session.step(one, zero, torch.tensor([start]), torch.tensor([[0]]))
    assert session._runner.plans == 2
    assert session.activation_bytes < 100_000


def test_a_step_is_cancelled_by_another_thread_and_can_be_taken_again() -> None:
    session, zero = _session(lowered("llama"), slots=1, capacity=64), torch.tensor([0])
    tokens, rows = torch.randint(0, 97, (1, 40), generator=torch.Generator().manual_seed(6)), torch.tensor([[39]])
    wanted = session.step(tokens, zero, zero, rows).clone()
    ended: list[BaseException] = []

    def work() -> None:
        deadline = time.monotonic() + 60
        while not ended and time.monotonic() < deadline:
            try:
                session.step(tokens, zero, zero, rows)
            except StepCancelled as error:
                ended.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    while thread.is_alive():
        session.cancel()
    thread.join()
    assert len(ended) == 1
    assert torch.equal(session.step(tokens, zero, zero, rows), wanted)


def test_explain_names_what_runs() -> None:
    uses = {use.op: use for use in lowered("llama").explain()}
    assert uses["graphwright.cached_attention"].kernel.startswith("decoder_attention ")
    assert uses["graphwright.cache_append"].kernel.startswith("part of decoder_attention ")
    assert uses["graphwright.rotary_embedding"].kernel.startswith("part of decoder_attention ")
    called = [use for use in lowered("llama").explain() if use.kernel == "torch" and use.reason]
    assert all("PyTorch" in use.reason for use in called)


def test_an_operator_without_an_instruction_runs_in_pytorch() -> None:
    """GPT-NeoX's rotary tables are computed by operators that have none."""
    uses = lowered("gpt-neox", fused=False).explain()
    called = {use.op for use in uses if "calls PyTorch" in use.reason}
    assert {"aten.cos", "aten.sin"} <= called


@pytest.mark.parametrize(
    ("tokens", "slots", "starts", "rows", "message"),
    [
        ([[1, 2]], [0], [15], [[0]], "do not fit a cache of 16"),
        ([[97]], [0], [0], [[0]], "not in the vocabulary"),
        ([[-1]], [0], [0], [[0]], "not in the vocabulary"),
        ([[1]], [2], [0], [[0]], "not distinct ones of 2"),
        ([[1], [1]], [0, 0], [0, 0], [[0], [0]], "not distinct"),
        ([[1]], [0], [0], [[1]], "not all among 1 tokens"),
        ([[1]], [0], [-1], [[0]], "do not fit"),
        ([[]], [0], [0], [[]], "no tokens"),
    ],
)
def test_steps_that_cannot_be_are_refused(tokens: Any, slots: Any, starts: Any, rows: Any, message: str) -> None:
    session = _session(lowered("llama"), slots=2, capacity=16)
    given = [torch.tensor(each, dtype=torch.int64) for each in (tokens, slots, starts, rows)]
    with pytest.raises(InputError, match=message):
        session.step(*given)


@pytest.mark.parametrize("options", [{"slots": 0}, {"capacity": 0}, {"cache": "float16"}])
def test_sessions_that_cannot_be_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="session"):
        _session(lowered("llama"), **options)
