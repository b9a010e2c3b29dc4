"""Pipelined decoding of real graphs: the same tokens as step by step, on both backends."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from tests.frontends.generators import PROMPTS, byte_tokenizer
from tests.frontends.shared_decoders import cycle, shared_decoder

import graphwright as gw
from graphwright.ir.errors import ProgramError

pytest.importorskip("transformers")

COUNT = 12
ORDERS = [cycle(2, 2), cycle(1, 4)]


@functools.cache
def _decoder(order: tuple[int, ...], target: str) -> Any:
    return gw.optimize(shared_decoder(order, prepared=True), target=target, verify=False)


def _decoders(order: list[int]) -> list[Any]:
    targets = ["reference"]
    try:
        import graphwright.backends.cpu._native  # noqa: F401 - is it there?
    except ImportError:
        return [_decoder(tuple(order), target) for target in targets]
    return [_decoder(tuple(order), target) for target in [*targets, "cpu"]]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"repetition_penalty": 1.5, "stop_tokens": [3, 41]},
        {"temperature": 1.3, "top_k": 20, "seed": 5},
        {"temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.2, "seed": 6, "batch_size": 2},
    ],
)
def test_tokens_are_those_of_single_steps(order: list[int], options: dict[str, Any]) -> None:
    for decoder in _decoders(order):
        wanted = decoder.generate(PROMPTS, max_new_tokens=COUNT, **options)
        found = decoder.generate(PROMPTS, max_new_tokens=COUNT, pipeline=True, **options)
        assert (found.tokens, found.stopped) == (wanted.tokens, wanted.stopped)
        assert len({token for new in found.tokens for token in new}) > 10


def test_a_model_that_was_not_trained_for_it_says_that_nothing_is_gained() -> None:
    """Random weights change their mind at nearly every repetition."""
    found = _decoder(tuple(cycle(1, 4)), "reference").generate(PROMPTS, max_new_tokens=COUNT, pipeline=True)
    assert found.pipeline.repeats == 4
    assert found.pipeline.first_flip_rate > 0.8
    assert ("nothing" if found.pipeline.gain < 1.15 else "little") in found.summary
    assert "is gained: train the model with a loss after every repetition" in found.summary


def test_prompts_longer_than_a_chunk_fill_every_repetition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphwright.frontends.generation.run.CHUNK", 3)
    for decoder in _decoders(cycle(2, 2)):
        prompt = [*range(20, 31)]
        wanted = decoder.generate([prompt], max_new_tokens=COUNT).tokens
        cache = decoder.prompt_cache(slots=2, capacity=40, pipeline=True)
        for _ in range(2):
            found = decoder.generate([prompt], max_new_tokens=COUNT, pipeline=True, cache=cache)
            assert found.tokens == wanted
        assert found.counts.reused_tokens == len(prompt) - 1


@pytest.mark.parametrize("cache", ["bfloat16", "int8"])
def test_rounded_caches_round_alike(cache: str) -> None:
    pytest.importorskip("graphwright.backends.cpu._native")
    decoder = _decoder(tuple(cycle(1, 4)), "cpu")
    wanted = decoder.generate(PROMPTS, max_new_tokens=COUNT, cache=cache).tokens
    assert decoder.generate(PROMPTS, max_new_tokens=COUNT, cache=cache, pipeline=True).tokens == wanted


def test_a_conversation_keeps_its_repetitions() -> None:
    model = shared_decoder(cycle(1, 4), prepared=True)
    table = torch.nn.Parameter(torch.randn(257, 32, generator=torch.Generator().manual_seed(0)))
    decoder: Any = gw.optimize(_with_vocabulary(model, table), verify=False)
    decoder.tokenizer = byte_tokenizer()
    answers = []
    for options in ({}, {"pipeline": True}):
        chat = decoder.chat(capacity=60, max_new_tokens=6, **options)
        answers.append([chat.send("hello").tokens, chat.send("more").tokens])
    assert answers[0] == answers[1]


def _with_vocabulary(program: gw.Program, table: torch.nn.Parameter) -> gw.Program:
    """The program with another table of embeddings, which is its head too."""
    for node in program.nodes:
        if node.op == "get_attr" and tuple(program.tensor(node).shape) == (97, 32):
            program.set_tensor(str(node.target), table)
    program.infer_types()
    return program


def test_orders_without_stages_say_why() -> None:
    for order, text in (([0, 0, 1, 1], "the order 1 1 2 2"), ([0, 1, 2, 3], "none is repeated")):
        with pytest.raises(ProgramError, match=text) as caught:
            _decoder(tuple(order), "reference").generate(PROMPTS, pipeline=True)
        assert "decode without it" in str(caught.value)
