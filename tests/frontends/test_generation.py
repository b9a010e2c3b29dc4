"""Generation: the tokens that transformers gives, whatever runs together; ends, errors, memory."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.frontends.decoders import make
from tests.frontends.generators import PROMPTS, TableDecoder, expected, model_and_decoder, script

import graphwright as gw
from graphwright.frontends.generation.facts import DecoderFacts
from graphwright.frontends.generation.run import CHUNK

pytest.importorskip("transformers")

COUNT = 12


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_prompts_of_different_lengths_give_what_each_gives_alone(batch_size: int) -> None:
    model, decoder = model_and_decoder()
    found = decoder.generate(PROMPTS, max_new_tokens=COUNT, batch_size=batch_size)
    assert [list(new) for new in found.tokens] == [expected(model, prompt, COUNT) for prompt in PROMPTS]
    assert found.stopped == ("length",) * len(PROMPTS)
    assert found.sequences == [[*prompt, *new] for prompt, new in zip(PROMPTS, found.tokens)]
    counts = found.counts
    assert counts.prompt_tokens == sum(map(len, PROMPTS))
    assert counts.new_tokens == COUNT * len(PROMPTS)
    assert counts.steps == {1: 4, 2: 2, 16: 1}[batch_size] * (COUNT - 1)
    assert counts.rate > 0
    assert counts.prompt_rate > 0
    assert "48 tokens" in str(found)


def test_a_real_model_gives_the_text_that_transformers_gives(tinylm_dir: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    factory, tokens = AutoModelForCausalLM, AutoTokenizer
    model = factory.from_pretrained(tinylm_dir, dtype=torch.float32)
    tokenizer: Any = tokens.from_pretrained(tinylm_dir)
    decoder: Any = gw.optimize(gw.load_decoder(model, check=False), verify=False)
    assert decoder.facts == DecoderFacts((1,), 512, tinylm_dir)
    prompts = ["The president said that", "Once upon a time, in a small", "Question: how many apples"]
    found = decoder.generate(prompts, max_new_tokens=30)
    for prompt, new, text in zip(prompts, found.tokens, found.texts):
        ids = tokenizer.encode(prompt)
        assert list(new) == expected(model, ids, 30)
        assert text == tokenizer.decode(new, skip_special_tokens=True).rstrip("\ufffd")
    drafted = decoder.generate(prompts, max_new_tokens=30, draft="prompt-lookup")
    assert drafted.tokens == found.tokens
    assert drafted.counts.accepted_tokens > 0
    # Across chunks of the prompt and through the cache's end.
    long = tokenizer.encode((tinylm_dir.parent.parent / "data/wikitext2/valid.txt").read_text()[:4000])[:500]
    found = decoder.generate(long, max_new_tokens=100)
    assert found.stopped == ("capacity",)
    assert list(found.tokens[0]) == expected(model, long, 12)


def test_tokens_come_in_every_form() -> None:
    _, decoder = model_and_decoder()
    wanted = decoder.generate(PROMPTS[:2], max_new_tokens=4).tokens
    padded = torch.tensor([[0] * 4 + PROMPTS[0], PROMPTS[1]])
    mask = torch.tensor([[0] * 4 + [1] * 4, [1] * 8])
    assert decoder.generate(padded, attention_mask=mask, max_new_tokens=4).tokens == wanted
    right = torch.tensor([PROMPTS[0] + [0] * 4, PROMPTS[1]])
    assert decoder.generate(right, attention_mask=mask.flip(1), max_new_tokens=4).tokens[0] == wanted[0]
    for form in (PROMPTS[0], torch.tensor(PROMPTS[0]), torch.tensor([PROMPTS[0]]), [torch.tensor(PROMPTS[0])]):
        assert decoder.generate(form, max_new_tokens=4).tokens == wanted[:1]
    assert decoder.generate(tuple(map(tuple, PROMPTS[:2])), max_new_tokens=4).tokens == wanted


def test_repetition_penalty_as_transformers() -> None:
    model, decoder = model_and_decoder()
    found = decoder.generate(PROMPTS, max_new_tokens=COUNT, repetition_penalty=1.7)
    assert [list(new) for new in found.tokens] == [
        expected(model, prompt, COUNT, repetition_penalty=1.7) for prompt in PROMPTS
    ]


def test_long_prompts_come_in_chunks() -> None:
    table = script(range(40), 50)
    decoder = TableDecoder(table)
    found = decoder.generate([[3] * (2 * CHUNK + 7), [5]], max_new_tokens=3)
    assert found.tokens == ((4, 5, 6), (6, 7, 8))
    assert decoder.sessions[0].steps == [(1, CHUNK), (1, CHUNK), (1, 7), (1, 1), (2, 1), (2, 1)]


# -- sampling ----------------------------------------------------------------------------------------------------------


def test_sampling_depends_on_the_seed_and_the_prompt_alone() -> None:
    _, decoder = model_and_decoder()
    options: dict[str, Any] = {"max_new_tokens": COUNT, "temperature": 1.0, "top_p": 0.9}
    together = decoder.generate(PROMPTS, seed=5, **options)
    assert decoder.generate(PROMPTS, seed=5, **options).tokens == together.tokens
    assert decoder.generate(PROMPTS, seed=6, **options).tokens != together.tokens
    for prompt, new in zip(PROMPTS, together.tokens):
        assert decoder.generate(prompt, seed=5, **options).tokens == (new,)
    turned = decoder.generate(PROMPTS[::-1], seed=5, batch_size=2, **options)
    assert turned.tokens == together.tokens[::-1]
    same = decoder.generate([PROMPTS[0]] * 3, seed=5, **options).tokens
    assert len(set(same)) == 3
    assert same[0] == together.tokens[0]


def test_without_a_seed_torch_decides_and_the_result_tells_it() -> None:
    _, decoder = model_and_decoder()
    torch.manual_seed(11)
    first = decoder.generate(PROMPTS[0], max_new_tokens=COUNT, temperature=1.0)
    second = decoder.generate(PROMPTS[0], max_new_tokens=COUNT, temperature=1.0)
    assert first.tokens != second.tokens
    torch.manual_seed(11)
    assert decoder.generate(PROMPTS[0], max_new_tokens=COUNT, temperature=1.0).tokens == first.tokens
    again = decoder.generate(PROMPTS[0], max_new_tokens=COUNT, temperature=1.0, seed=second.seed)
    assert again.tokens == second.tokens


# -- ends --------------------------------------------------------------------------------------------------------------


def test_stop_tokens_end_answers_and_others_go_on() -> None:
    decoder = TableDecoder(script(range(30), 40), DecoderFacts(stop_tokens=(12,)))
    found = decoder.generate([[1], [9], [11], [20]], max_new_tokens=6)
    assert found.tokens == ((2, 3, 4, 5, 6, 7), (10, 11, 12), (12,), (21, 22, 23, 24, 25, 26))
    assert found.stopped == ("length", "stop_token", "stop_token", "length")
    # As answers end, the steps take fewer rows.
    assert [rows for rows, _ in decoder.sessions[0].steps] == [1, 1, 1, 1, 3, 3, 2, 2, 2]
    assert decoder.generate([9], max_new_tokens=4, stop_tokens=()).tokens == ((10, 11, 12, 13),)
    assert decoder.generate([9], max_new_tokens=4, stop_tokens=[11, 30]).tokens == ((10, 11),)


def test_the_context_and_the_cache_end_answers() -> None:
    decoder = TableDecoder(script(range(30), 40), DecoderFacts(context=6))
    found = decoder.generate([[1, 2, 3], [1, 2, 3, 4, 5]], max_new_tokens=10)
    assert found.tokens == ((4, 5, 6), (6,))
    assert found.stopped == ("capacity", "capacity")
    short = decoder.prompt_cache(capacity=4)
    assert decoder.generate([1, 2], max_new_tokens=10, cache=short).tokens == ((3, 4),)
    assert decoder.generate([1, 2], max_new_tokens=2, cache=short).stopped == ("length",)


def test_cancelling_from_another_thread_ends_between_steps() -> None:
    decoder = TableDecoder(torch.eye(8).roll(1, 1))
    stream = decoder.stream([3], max_new_tokens=50_000)
    seen: list[Any] = []
    reached = threading.Event()

    def read() -> None:
        for piece in stream:
            seen.append(piece)
            if len(seen) == 20:
                reached.set()

    reader = threading.Thread(target=read)
    reader.start()
    assert reached.wait(20)
    stream.cancel()
    reader.join(20)
    assert not reader.is_alive()
    assert stream.result.stopped == ("cancelled",)
    assert list(stream.result.tokens[0]) == seen
    assert 20 <= len(seen) < 50_000


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": []}, "there is no prompt"),
        ({"prompts": [[]]}, "prompt 1.*|is empty"),
        ({"prompts": [[1], []]}, "is empty .at prompt 2"),
        ({"prompts": "text"}, "there is no tokenizer"),
        ({"prompts": ["a", "b"]}, "there is no tokenizer"),
        ({"prompts": 3}, "cannot be a int"),
        ({"prompts": [[1], ["a"]]}, "neither a string nor a list of tokens .at prompt 2"),
        ({"prompts": [[True]]}, "neither a string nor"),
        ({"prompts": [1, 97]}, "token 97, the vocabulary has 97"),
        ({"prompts": [-1]}, "token -1"),
        ({"prompts": [1] * 128}, "has 128 tokens; 128 is all"),
        ({"prompts": torch.ones(1, 2)}, "torch.float32"),
        ({"prompts": torch.ones(1, 2, 3, dtype=torch.int64)}, "give integers"),
        ({"prompts": torch.tensor([[1, 2, 3]]), "attention_mask": torch.tensor([[1, 0, 1]])}, "has gaps"),
        ({"prompts": torch.tensor([[1, 2, 3]]), "attention_mask": torch.tensor([[0, 0, 0]])}, "is empty"),
        ({"prompts": torch.tensor([[1, 2, 3]]), "attention_mask": torch.tensor([[1, 1]])}, "attention_mask"),
        ({"attention_mask": torch.tensor([[1]])}, "for prompts that are a tensor"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": -3}, "max_new_tokens"),
        ({"max_new_tokens": 2.5}, "max_new_tokens"),
        ({"batch_size": 0}, "batch_size"),
        ({"top_p": 1.5}, "top_p"),
        ({"temperature": -1}, "temperature"),
        ({"stop_tokens": [97]}, "97 is not in the vocabulary"),
        ({"stop": "x"}, "needs a tokenizer"),
        ({"draft": "oracle"}, "'oracle' is no draft"),
        ({"draft": 3}, "int is no draft"),
        ({"draft": "prompt-lookup", "draft_tokens": 0}, "draft_tokens"),
        ({"cache": "int3"}, "int3"),
        ({"tokenizer": 3}, "no tokenizer"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(
    options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, decoder = model_and_decoder()
    monkeypatch.setattr("graphwright.backends.session.Session.step", lambda *given: pytest.fail("a step has run"))
    given = {"prompts": [1, 2], "max_new_tokens": 4, **options}
    with pytest.raises(gw.InputError, match=message):
        decoder.generate(**given)
    with pytest.raises(gw.InputError):
        decoder.stream(given.pop("prompts"), **given)


def test_a_stream_takes_one_prompt_and_known_options() -> None:
    _, decoder = model_and_decoder()
    with pytest.raises(gw.InputError, match="one prompt, not 2"):
        decoder.stream([[1], [2]])
    with pytest.raises(gw.InputError, match="(?s)no option 'max_tokens'.*options: max_new_tokens"):
        decoder.stream([1], max_tokens=3)


@pytest.mark.parametrize(("value", "word"), [(float("nan"), "NaN"), (float("inf"), "infinite")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_name_the_prompt_and_the_token(value: float, word: str, temperature: float) -> None:
    table = script(range(30), 40)
    table[table == 9] = 50.0  # certain also in sampling
    table[7, 20] = value
    decoder = TableDecoder(table)
    cache = decoder.prompt_cache(slots=2)
    with pytest.raises(gw.GenerationError, match=f"{word}.*prompt 2, token 4 of its answer"):
        decoder.generate([[11], [4]], max_new_tokens=8, temperature=temperature, cache=cache)
    assert cache.free == 2


def test_other_models_do_not_generate() -> None:
    small = gw.optimize(torch.nn.Linear(3, 2), example_inputs=torch.ones(1, 3))
    assert not isinstance(small, gw.Decoder)
    assert not hasattr(small, "generate")


def test_memory_that_cannot_be_had_is_an_error() -> None:
    _, decoder = model_and_decoder()
    with pytest.raises(gw.InputError, match=r"\d+\.0 GiB, which cannot be had"):
        decoder.session(capacity=2**44)


# -- memory ------------------------------------------------------------------------------------------------------------


def resident_kib() -> int:
    status = Path("/proc/self/status")
    if not status.is_file():
        pytest.skip("needs /proc/self/status to read the memory of this process")
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1])


def refused(decoder: TableDecoder) -> None:
    with pytest.raises(gw.InputError):
        decoder.generate([99], max_new_tokens=3)


@pytest.mark.parametrize("kind", ["generate", "stream", "cancelled", "draft", "failed"])
def test_thousands_of_generations_keep_memory_flat(kind: str) -> None:
    table = script(range(30), 40)
    decoder = TableDecoder(table)
    calls: dict[str, Callable[[], object]] = {
        "generate": lambda: decoder.generate([[1], [2, 3]], max_new_tokens=3, temperature=0.8),
        "stream": lambda: list(decoder.stream([1], max_new_tokens=3)),
        "cancelled": lambda: next(decoder.stream([1], max_new_tokens=3)),
        "draft": lambda: decoder.generate([1, 2, 1], max_new_tokens=4, draft="prompt-lookup"),
        "failed": lambda: refused(decoder),
    }

    def repeat(count: int) -> None:
        for _ in range(count):
            calls[kind]()
            decoder.sessions.clear()
        gc.collect()

    repeat(500)
    before = resident_kib()
    repeat(1500)
    assert resident_kib() - before < 4096


def test_generations_with_a_model_keep_memory_flat() -> None:
    _, decoder = model_and_decoder(1)
    cache = decoder.prompt_cache(slots=2, capacity=32)

    def repeat(count: int) -> None:
        for number in range(count):
            prompts = [[1, number % 90, 3], [2, (7 * number) % 90]]
            decoder.generate(prompts, max_new_tokens=4, cache=cache if number % 2 else "float32")
        gc.collect()

    repeat(60)
    before = resident_kib()
    repeat(200)
    assert resident_kib() - before < 8192


# -- families ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_other_families(name: str) -> None:
    """Learnt positions, windows and soft caps; drafts and their rollback too."""
    model = make(name)
    decoder: Any = gw.optimize(gw.load_decoder(model, check=False), verify=False)
    wanted = [expected(model, prompt, COUNT) for prompt in PROMPTS]
    for options in ({}, {"draft": "prompt-lookup"}, {"draft": decoder, "draft_tokens": 3}):
        found = decoder.generate(PROMPTS, max_new_tokens=COUNT, **options)
        assert [list(new) for new in found.tokens] == wanted


def test_learnt_positions_end_where_the_table_does() -> None:
    model = make("gpt2", n_positions=16)
    decoder: Any = gw.optimize(gw.load_decoder(model, check=False), verify=False)
    for options in ({}, {"draft": "prompt-lookup"}, {"draft": decoder}):
        found = decoder.generate([[1, 2, 3], [5] * 12], max_new_tokens=40, **options)
        assert [len(new) for new in found.tokens] == [13, 4]
        assert list(found.tokens[1]) == expected(model, [5] * 12, 4)
        assert found.stopped == ("capacity", "capacity")
