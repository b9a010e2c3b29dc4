"""Prompts that begin alike: what a cache keeps, shares and copies, and that answers stay the same."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from tests.frontends.generators import TableDecoder, expected, model_and_decoder, script

import graphwright as gw
from graphwright.frontends.generation.prompt_cache import common_prefix

pytest.importorskip("transformers")

COUNT = 6


def computed(decoder: TableDecoder) -> int:
    """Tokens that the decoder's last session has taken in."""
    steps = decoder.sessions[-1].steps
    total = sum(rows * length for rows, length in steps)
    steps.clear()
    return total


def test_a_conversation_computes_only_what_is_new() -> None:
    model, decoder = model_and_decoder()
    cache = decoder.prompt_cache(capacity=80)
    tokens = [1, 5, 9]
    for turn in range(4):
        found = decoder.generate(tokens, max_new_tokens=COUNT, cache=cache)
        assert list(found.tokens[0]) == expected(model, tokens, COUNT)
        # All but the answer's last token, which was never taken in.
        assert found.counts.reused_tokens == (len(tokens) - 5 if turn else 0)
        tokens = [*found.sequences[0], 7, 20 + turn, 3, 4]
    assert decoder.generate(tokens[:6], max_new_tokens=COUNT, cache=cache).counts.reused_tokens == 5


def test_prompts_of_one_call_share_their_beginning() -> None:
    decoder = TableDecoder(script(range(60), 70))
    beginning = list(range(40, 50))
    prompts = [[*beginning, 1], [*beginning, 2, 3], [40, 41, 9], [6]]
    found = decoder.generate(prompts, max_new_tokens=1)
    assert found.tokens == ((2,), (4,), (10,), (7,))
    assert found.counts.reused_tokens == 10 + 2
    assert computed(decoder) == 11 + 2 + 1 + 1


def test_equal_prompts_are_computed_once() -> None:
    model, decoder = model_and_decoder()
    found = decoder.generate([[1, 5, 9, 33]] * 3, max_new_tokens=COUNT)
    assert found.counts.reused_tokens == 6
    assert [list(new) for new in found.tokens] == [expected(model, [1, 5, 9, 33], COUNT)] * 3


def test_a_beginning_is_copied_where_the_rest_differs_and_there_is_room() -> None:
    decoder = TableDecoder(script(range(60), 70))
    cache = decoder.prompt_cache(slots=2)
    decoder.generate([1, 2, 3, 10], max_new_tokens=3, cache=cache)
    decoder.generate([1, 2, 3, 20], max_new_tokens=3, cache=cache)
    assert sorted(cache.held) == [[1, 2, 3, 10, 11, 12], [1, 2, 3, 20, 21, 22]]
    # Both go on; then a third beginning takes the place of what was used longest ago.
    assert decoder.generate([1, 2, 3, 10, 11, 12, 13], max_new_tokens=1, cache=cache).counts.reused_tokens == 6
    assert decoder.generate([1, 2, 3, 20, 30], max_new_tokens=1, cache=cache).counts.reused_tokens == 4
    assert sorted(held[3] for held in cache.held) == [20, 20]
    cache.clear()
    assert cache.held == [[], []]
    assert decoder.generate([1, 2, 3, 10], max_new_tokens=1, cache=cache).counts.reused_tokens == 0


def test_any_order_of_calls_gives_what_fresh_caches_give() -> None:
    """Random prompts that share beginnings, in batches, over one small cache; the model is real."""
    _, decoder = model_and_decoder()
    rng = random.Random(3)
    cache = decoder.prompt_cache(slots=3, capacity=40)
    known = [[1]]
    for _ in range(25):
        prompts = []
        for _ in range(rng.randint(1, 4)):
            base = rng.choice(known)
            cut = rng.randint(1, len(base))
            prompts.append((base[:cut] + [rng.randrange(97) for _ in range(rng.randint(0, 4))])[:30])
        options: dict[str, Any] = {"max_new_tokens": COUNT, "temperature": rng.choice([0.0, 1.0]), "seed": 4}
        options["draft"] = rng.choice([None, "prompt-lookup"])
        found = decoder.generate(prompts, cache=cache, **options)
        options["draft"] = options["draft"] if options["temperature"] else None
        assert found.tokens == decoder.generate(prompts, **options).tokens
        assert cache.free == 3
        known = [*known[-6:], *found.sequences]


def test_two_streams_share_a_cache() -> None:
    decoder = TableDecoder(script(range(60), 70))
    cache = decoder.prompt_cache(slots=2)
    first, second = (decoder.stream([token], max_new_tokens=3, cache=cache) for token in (1, 30))
    assert [next(first), next(second), next(first), next(second)] == [2, 31, 3, 32]
    assert [*first, *second] == [4, 33]
    assert cache.free == 2


def test_a_prompt_that_does_not_fit_is_refused_and_nothing_is_lost() -> None:
    decoder = TableDecoder(script(range(60), 70))
    cache = decoder.prompt_cache(slots=1, capacity=8)
    decoder.generate([1, 2, 3], max_new_tokens=2, cache=cache)
    with pytest.raises(gw.InputError, match="has 8 tokens; 8 is all that prompt and answer may have"):
        decoder.generate([1] * 8, cache=cache)
    assert cache.held == [[1, 2, 3, 4]]


def test_a_cache_of_another_decoder_is_refused() -> None:
    first, second = TableDecoder(torch.eye(9)), TableDecoder(torch.eye(9))
    with pytest.raises(gw.InputError, match="another decoder's"):
        second.generate([1], cache=first.prompt_cache())


def test_common_prefix() -> None:
    rng = random.Random(0)
    for _ in range(200):
        first = [rng.randrange(2) for _ in range(rng.randrange(9))]
        second = [rng.randrange(2) for _ in range(rng.randrange(9))]
        length = 0
        while length < min(len(first), len(second)) and first[length] == second[length]:
            length += 1
        assert common_prefix(first, second) == length
