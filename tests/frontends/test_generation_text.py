"""Text as it comes: whole characters, stop strings, streams, and the tokenizer itself."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies
from tests.frontends.generators import TableDecoder, byte_tokenizer, model_and_decoder, script

import graphwright as gw
from graphwright.frontends.generation.facts import DecoderFacts
from graphwright.frontends.generation.text import TextTail

pytest.importorskip("transformers")

BYTES = byte_tokenizer()


def answer(text: str, **options: Any) -> tuple[list[str], gw.Generation]:
    """Pieces and result of a stream whose model answers ``!`` with this text, byte by byte, and then ends."""
    decoder = ScriptedDecoder(text)
    with decoder.stream("!", **{"max_new_tokens": 200, **options}) as stream:
        pieces = [str(piece) for piece in stream]
    whole = decoder.generate("!", **{"max_new_tokens": 200, **options})
    assert (whole.texts, whole.tokens, whole.stopped) == (
        stream.result.texts,
        stream.result.tokens,
        stream.result.stopped,
    )
    assert "".join(pieces) == whole.text
    assert all(pieces)
    return pieces, whole


class ScriptedDecoder(TableDecoder):
    """Says the bytes of a text, whatever it is asked; then ``</s>``."""

    def __init__(self, text: str) -> None:
        super().__init__(torch.zeros(257, 257), tokenizer=BYTES)
        self.says = [*text.encode(), 256]

    def session(self, *, slots: int = 1, capacity: int | None = None, cache: str = "float32", depth: Any = None) -> Any:
        made = super().session(slots=slots, capacity=capacity, cache=cache)
        says = self.says

        def step(tokens: torch.Tensor, slots: torch.Tensor, starts: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
            logits = torch.zeros(*rows.shape, 257)
            for row, wanted in enumerate(rows.tolist()):
                for at, column in enumerate(wanted):
                    logits[row, at, says[min(int(starts[row]) + column, len(says) - 1)]] = 1.0
            return logits

        made._step = step  # type: ignore[method-assign]
        return made


def test_characters_come_whole() -> None:
    pieces, whole = answer("aé漢😀z")
    assert pieces == ["a", "é", "漢", "😀", "z"]
    assert whole.stopped == ("stop_token",)
    assert whole.tokens[0][-1] == 256
    assert answer("aé漢", max_new_tokens=4)[0] == ["a", "é"]  # the last one is not whole


def test_a_character_that_the_prompt_began_is_finished() -> None:
    tail = TextTail(BYTES, [*b"x", 0xC3])
    assert [tail.push(0xA9), tail.push(ord("y"))] == ["é", "y"]


def test_bytes_that_never_become_a_character_are_shown_once_that_is_clear() -> None:
    tail = TextTail(BYTES, b"x")
    assert [tail.push(0xE6), tail.push(0xBC), tail.push(ord("y"))] == ["", "", "\ufffdy"]


@pytest.mark.parametrize(
    ("text", "stop", "wanted", "pieces"),
    [
        ("hello END more", "END", "hello ", ["h", "e", "l", "l", "o", " "]),
        ("ab", "b", "a", ["a"]),
        ("EN-END", "END", "EN-", ["EN-"]),
        ("aab", ["ab", "zz"], "a", ["a"]),
        ("abab!", "abac", "abab!", ["ab", "ab!"]),
        ("EN", "END", "EN", ["EN"]),
        ("x漢字y", "字", "x漢", ["x", "漢"]),
        ("\n\nUser", ["\n\nUser", "User"], "", []),
    ],
)
def test_stop_strings(text: str, stop: str | list[str], wanted: str, pieces: list[str]) -> None:
    found, whole = answer(text, stop=stop)
    assert whole.text == wanted
    assert found == pieces
    is_stopped = wanted != text
    assert whole.stopped == ("stop_string" if is_stopped else "stop_token",)
    if is_stopped:  # its tokens end with those of the stop string, as in transformers
        assert bytes(whole.tokens[0]).decode().startswith(wanted)
        assert any(
            bytes(whole.tokens[0]).decode().endswith(each) for each in ([stop] if isinstance(stop, str) else stop)
        )


@hypothesis.given(
    text=strategies.text(alphabet="ab é漢😀\n", max_size=40),
    stop=strategies.lists(strategies.text(alphabet="ab é漢", min_size=1, max_size=4), max_size=3),
)
@hypothesis.settings(max_examples=60)
def test_any_text_with_any_stop_strings(text: str, stop: list[str]) -> None:
    tail = TextTail(BYTES, b"?", stop)
    pieces = []
    for byte in text.encode():
        pieces.append(tail.push(byte))
        if tail.is_stopped:
            break
    pieces.append(tail.finish())
    # The first stop string to be complete ends it; of those, the one that begins first.
    ends = min((text.find(each) + len(each) for each in stop if each in text), default=None)
    wanted = text if ends is None else text[: min(ends - len(each) for each in stop if text[:ends].endswith(each))]
    assert "".join(pieces) == wanted == tail.text
    assert "\ufffd" not in tail.text


def test_a_stream_without_a_tokenizer_gives_tokens() -> None:
    _, decoder = model_and_decoder()
    with decoder.stream([1, 5], max_new_tokens=6) as stream:
        assert list(stream) == list(decoder.generate([1, 5], max_new_tokens=6).tokens[0])
    assert list(stream) == []
    assert stream.result.texts is None


def test_closing_a_stream_early_gives_its_slot_back() -> None:
    decoder = TableDecoder(script(range(30), 40))
    cache = decoder.prompt_cache(slots=1)
    stream = decoder.stream([1], max_new_tokens=9, cache=cache)
    assert [next(stream), next(stream)] == [2, 3]
    assert cache.free == 0
    with pytest.raises(gw.InputError, match="all 1 slots of the cache are occupied"):
        decoder.generate([5], cache=cache)
    stream.close()
    stream.close()
    assert cache.free == 1
    assert list(stream) == []
    assert stream.result.tokens == ((2, 3),)
    assert stream.result.stopped == ("cancelled",)
    assert decoder.generate([5], cache=cache, max_new_tokens=2).tokens == ((6, 7),)


def test_closing_from_another_thread_waits_for_the_step() -> None:
    decoder = TableDecoder(torch.eye(8).roll(1, 1))
    cache = decoder.prompt_cache(slots=1, capacity=10**5)
    stream = decoder.stream([3], max_new_tokens=90_000, cache=cache)
    inside, leave = threading.Event(), threading.Event()
    session: Any = cache.session
    original = session._step

    def slow(*given: Any) -> Any:
        inside.set()
        assert leave.wait(20)
        return original(*given)

    session._step = slow
    reader = threading.Thread(target=lambda: list(stream))
    closer = threading.Thread(target=stream.close)
    reader.start()
    assert inside.wait(20)
    closer.start()
    closer.join(0.05)
    assert closer.is_alive()
    assert cache.free == 0
    leave.set()
    closer.join(20)
    reader.join(20)
    assert not closer.is_alive()
    assert not reader.is_alive()
    assert cache.free == 1
    assert stream.result.stopped == ("cancelled",)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_error_in_the_middle_of_a_step_leaves_the_cache_usable(error: type[BaseException]) -> None:
    decoder = TableDecoder(script(range(30), 40))
    cache = decoder.prompt_cache(slots=1)
    stream = decoder.stream([1], max_new_tokens=9, cache=cache)
    assert next(stream) == 2
    session: Any = cache.session
    original = session._step

    def fail(*given: Any) -> Any:
        raise error

    session._step = fail
    with pytest.raises(error):
        next(stream)
    session._step = original
    assert stream.result.stopped == ("cancelled",)
    assert cache.free == 1
    assert cache.held == [[1]]
    assert decoder.generate([1, 2, 3], cache=cache, max_new_tokens=2).tokens == ((4, 5),)


# -- tokenizers --------------------------------------------------------------------------------------------------------


def test_the_tokenizer_of_the_folder_is_used(tmp_path: Path) -> None:
    BYTES.save_pretrained(tmp_path)
    decoder = TableDecoder(torch.eye(257), DecoderFacts(folder=tmp_path))
    assert decoder.generate("ab", max_new_tokens=3).text == "bbb"
    assert TableDecoder(torch.eye(257), DecoderFacts(folder=tmp_path / "none")).tokenizer is None
    given = TableDecoder(torch.eye(257)).generate("ab", max_new_tokens=3, tokenizer=tmp_path)
    assert given.text == "bbb"
    core = TableDecoder(torch.eye(257)).generate("ab", max_new_tokens=3, tokenizer=BYTES.backend_tokenizer)
    assert core.text == "bbb"


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    BYTES.save_pretrained(tmp_path)
    decoder = TableDecoder(torch.eye(200), DecoderFacts(folder=tmp_path))
    with pytest.raises(gw.InputError, match="tokens up to 256, the model has a vocabulary of 200"):
        decoder.generate("a")
    with pytest.raises(gw.InputError, match="it belongs to another model"):
        TableDecoder(torch.eye(200)).generate("a", tokenizer=BYTES)


def test_folders_without_a_readable_tokenizer_are_refused(tmp_path: Path) -> None:
    decoder = TableDecoder(torch.eye(257))
    with pytest.raises(gw.InputError, match="holds no tokenizer"):
        decoder.tokenizer = tmp_path
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(gw.InputError, match="cannot be read"):
        decoder.tokenizer = tmp_path


def test_facts_are_read_and_written(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 3, "max_position_embeddings": 77}))
    assert DecoderFacts.of_folder(tmp_path) == DecoderFacts((3,), 77, tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [4, 5]}))
    facts = DecoderFacts.of_folder(tmp_path)
    assert facts == DecoderFacts((4, 5), 77, tmp_path)
    (tmp_path / "saved").mkdir()
    facts.save(tmp_path / "saved")
    assert DecoderFacts.of_folder(tmp_path / "saved") == DecoderFacts((4, 5), 77, tmp_path / "saved")
    assert [path.name for path in (tmp_path / "saved").iterdir()] == ["decoder.json"]
    for damaged in ("{", "[]", "{}", '{"format": "graphwright decoder", "stop_tokens": ["a"]}'):
        (tmp_path / "decoder.json").write_text(damaged)
        with pytest.raises(gw.InputError, match="decoder.json"):
            DecoderFacts.of_folder(tmp_path)
    with pytest.raises(gw.SerializationError, match="decoder.json"):
        facts.save(tmp_path / "nowhere")
