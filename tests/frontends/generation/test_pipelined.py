"""Pipelined decoding: the answers of ordinary decoding, in fewer stages where predictions do not change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.frontends.generation.scripted import ScriptedDecoder
from tests.frontends.generators import TableDecoder, byte_tokenizer, script

from graphwright.frontends.generation.result import Pipelining
from graphwright.ir.errors import GenerationError, InputError


@settings(max_examples=150, deadline=None)
@given(
    repeats=st.sampled_from([2, 3, 4, 6]),
    flips=st.sampled_from([0.0, 0.05, 0.15, 0.5, 0.9, 1.0]),
    vocabulary=st.sampled_from([3, 8, 40]),
    prompts=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5), min_size=1, max_size=4),
    sampling=st.sampled_from(
        [
            {},
            {"repetition_penalty": 1.7},
            {"temperature": 0.8},
            {"temperature": 3.0, "top_k": 5, "repetition_penalty": 1.3},
            {"temperature": 1.0, "top_p": 0.8, "min_p": 0.05},
        ]
    ),
    stop=st.sampled_from([(), (1,), (0, 2)]),
    count=st.integers(1, 14),
    batch=st.integers(1, 3),
    seed=st.integers(0, 3),
)
def test_answers_are_those_of_ordinary_decoding(
    repeats: int,
    flips: float,
    vocabulary: int,
    prompts: list[list[int]],
    sampling: dict[str, Any],
    stop: tuple[int, ...],
    count: int,
    batch: int,
    seed: int,
) -> None:
    """Whatever the intermediate predictions are. The session fails where a stale cache entry is read."""
    decoder = ScriptedDecoder(vocabulary, repeats, flips)
    options: dict[str, Any] = {
        "max_new_tokens": count,
        "stop_tokens": stop,
        "batch_size": batch,
        "seed": seed,
        **sampling,
    }
    wanted = decoder.generate(prompts, **options)
    found = decoder.generate(prompts, pipeline=True, **options)
    assert (found.tokens, found.stopped) == (wanted.tokens, wanted.stopped)
    made = found.pipeline
    assert made is not None
    assert wanted.pipeline is None
    assert made.completed == sum(len(new) - 1 for new in found.tokens)
    # A stage lets the pipeline grow by one token for each answer, and none takes longer than through all repetitions.
    assert made.completed <= made.lane_stages <= repeats * made.completed
    assert made.rows <= repeats * made.lane_stages
    assert sum(made.flips) >= made.first_flips
    if flips == 0.0:
        assert made.flips == (0,) * (repeats - 1)
        assert made.dropped == 0


@pytest.mark.parametrize("repeats", [2, 3, 4, 6])
def test_stages_are_counted(repeats: int) -> None:
    """One for each token and as many as it takes to fill the pipeline; all of them where every guess is wrong."""
    count = 9
    best = ScriptedDecoder(50, repeats, 0.0).generate([3, 4], max_new_tokens=count, pipeline=True).pipeline
    assert best is not None
    assert best.stages == count - 1 + repeats - 1
    assert best.gain == pytest.approx(repeats * (count - 1) / best.stages)
    assert "nothing is gained" not in best.summary
    worst = ScriptedDecoder(50, repeats, 1.0).generate([3, 4], max_new_tokens=count, pipeline=True).pipeline
    assert worst is not None
    # A repetition may move its logits so that the same token is best by chance, but hardly twice.
    assert worst.flip_rates[-1] > 0.7
    assert worst.gain < best.gain
    empty = Pipelining(repeats)
    assert (empty.gain, empty.occupancy, empty.first_flip_rate, empty.flip_rates) == (0, 0, 0, ())


class Stubborn(ScriptedDecoder):
    """Guesses wrong at every repetition, and each time otherwise."""

    def session(self, **options: Any) -> Any:
        session = super().session(**options)

        def logits(text: list[int], depth: int) -> torch.Tensor:
            found = torch.zeros(self.layout.vocabulary)
            found[(sum(text) + depth) % self.layout.vocabulary] = 1.0
            return found

        session.logits = logits  # type: ignore[method-assign]
        return session


@pytest.mark.parametrize("repeats", [2, 3, 6])
def test_nothing_is_gained_or_lost_where_every_guess_is_wrong(repeats: int) -> None:
    decoder = Stubborn(11, repeats, 0.0)
    found = decoder.generate([[5], [2, 3]], max_new_tokens=7, pipeline=True)
    assert found.tokens == decoder.generate([[5], [2, 3]], max_new_tokens=7).tokens
    made = found.pipeline
    assert made is not None
    assert made.flip_rates == (1.0,) * (repeats - 1)
    assert made.first_flip_rate == 1.0
    assert made.stages == repeats * 6
    assert made.gain == 1.0
    assert "nothing is gained: train the model with a loss after every repetition" in found.summary
    assert found.as_json()["pipeline"]["flip_rates"] == [1.0] * (repeats - 1)


def test_a_prompt_cache_goes_on_from_what_has_been_through_all_repetitions() -> None:
    decoder = ScriptedDecoder(30, 3, 0.3)
    cache = decoder.prompt_cache(slots=3, capacity=40, pipeline=True)
    first = decoder.generate([1, 2], max_new_tokens=9, pipeline=True, cache=cache)
    told = [1, 2, *first.tokens[0], 7]
    for options in ({"pipeline": True}, {}):  # such a cache serves ordinary decoding too
        again = decoder.generate([told, [1, 2, 5]], max_new_tokens=5, cache=cache, **options)
        assert again.tokens == decoder.generate([told, [1, 2, 5]], max_new_tokens=5).tokens
        assert again.counts.reused_tokens >= len(told) - 3
    assert cache.free == 3


def test_a_stream_gives_tokens_as_they_become_final() -> None:
    decoder = ScriptedDecoder(30, 3, 0.2)
    wanted = list(decoder.generate([1, 2], max_new_tokens=9).tokens[0])
    with decoder.stream([1, 2], max_new_tokens=9, pipeline=True) as stream:
        assert list(stream) == wanted
    assert stream.result.pipeline is not None
    assert stream.result.pipeline.completed == 8
    cache = decoder.prompt_cache(capacity=20, pipeline=True)
    with decoder.stream([1, 2], max_new_tokens=9, pipeline=True, cache=cache) as stream:
        assert [next(stream), next(stream)] == wanted[:2]
        stream.cancel()
        assert list(stream) in ([], wanted[2:3])
    assert stream.result.stopped == ("cancelled",)
    assert cache.free == 1
    assert list(decoder.generate([1, 2], max_new_tokens=9, pipeline=True, cache=cache).tokens[0]) == wanted


def test_strings_end_an_answer() -> None:
    decoder = ScriptedDecoder(257, 2, 0.4)
    decoder.tokenizer = byte_tokenizer()
    options: dict[str, Any] = {"max_new_tokens": 30, "temperature": 0.3, "seed": 1}
    whole = decoder.generate("ab", **options).text
    assert whole is not None
    assert len(whole) > 3
    options["stop"] = whole[2]
    found, wanted = decoder.generate("ab", pipeline=True, **options), decoder.generate("ab", **options)
    assert (found.texts, found.stopped) == (wanted.texts, wanted.stopped)
    assert found.stopped == ("stop_string",)


def test_the_context_ends_an_answer() -> None:
    from graphwright.frontends.generation.facts import DecoderFacts

    decoder = ScriptedDecoder(20, 3, 0.3, DecoderFacts(context=8))
    found, wanted = (decoder.generate([[1, 2, 3]], pipeline=each) for each in (True, False))
    assert (found.tokens, found.stopped) == (wanted.tokens, wanted.stopped)
    assert found.stopped == ("capacity",)


def test_an_early_exit_is_counted_and_labelled() -> None:
    decoder = ScriptedDecoder(12, 4, 0.5)
    plain = decoder.generate([1, 2], max_new_tokens=30, pipeline=True)
    never = decoder.generate([1, 2], max_new_tokens=30, pipeline=True, exit_confidence=1.0)
    assert never.tokens == plain.tokens
    assert never.pipeline is not None
    assert never.pipeline.early_exits == 0
    early = decoder.generate([1, 2], max_new_tokens=30, pipeline=True, exit_confidence=1e-6)
    made = early.pipeline
    assert made is not None
    assert made.early_exits == 29
    assert made.early_flips > 0
    assert early.tokens != plain.tokens
    assert "not ordinary decoding's answers" in early.summary
    # What is taken is what the first repetition says, on caches of all repetitions.
    session = decoder.session()
    text = [1, 2, early.tokens[0][0]]
    for token in early.tokens[0][1:]:
        assert token == int(session.logits(text, 0).argmax())
        text.append(token)
    # All tokens but the last few, which the end of the answer left behind, went on through all repetitions.
    assert made.completed >= 29 - 4


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_stop_the_answer_where_they_are_final(value: float) -> None:
    class Broken(ScriptedDecoder):
        depth = 1

        def session(self, **options: Any) -> Any:
            session = super().session(**options)
            plain = session.logits

            def logits(text: list[int], depth: int) -> torch.Tensor:
                found = plain(text, depth)
                if len(text) == 4 and depth == self.depth:
                    found[3] = value
                return found

            session.logits = logits  # type: ignore[method-assign]
            return session

    decoder = Broken(20, 3, 0.0)
    # Ordinary decoding never looks there.
    assert decoder.generate([1, 2], max_new_tokens=6, pipeline=True).tokens == (
        ScriptedDecoder(20, 3, 0.0).generate([1, 2], max_new_tokens=6).tokens
    )
    decoder.depth = 2
    with pytest.raises(GenerationError, match=r"logits are (NaN|infinite)") as caught:
        decoder.generate([1, 2], max_new_tokens=6, pipeline=True)
    assert "token 3 of its answer" in str(caught.value)


def test_options_that_do_not_fit_are_refused() -> None:
    decoder = ScriptedDecoder(12, 3, 0.5)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"pipeline": True, "draft": "prompt-lookup"}, "cannot be had with pipeline=True"),
        ({"exit_confidence": 0.5}, "is for pipelined decoding"),
        ({"pipeline": True, "exit_confidence": 0}, "must be above 0 and at most 1"),
        ({"pipeline": True, "exit_confidence": float("nan")}, "must be above 0 and at most 1"),
        ({"pipeline": True, "exit_confidence": "high"}, "must be above 0 and at most 1"),
        ({"pipeline": True, "cache": decoder.prompt_cache(capacity=3)}, "4 tokens"),
    ]
    for options, text in cases:
        with pytest.raises(InputError, match=text):
            decoder.generate([1, 2, 3, 4], **options)
    other = TableDecoder(script([1, 2, 3], 5))
    with pytest.raises(InputError, match="has no caches for repetitions"):
        other.generate([1, 2], pipeline=True, cache=other.prompt_cache())
