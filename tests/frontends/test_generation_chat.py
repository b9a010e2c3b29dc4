"""Conversations, and the command line around them: from a folder to an answer."""

from __future__ import annotations

import functools
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.frontends.decoders import make
from tests.frontends.generators import TableDecoder, byte_tokenizer, script

import graphwright as gw
from graphwright.frontends.cli.main import main
from graphwright.frontends.generation.facts import DecoderFacts

pytest.importorskip("transformers")

BYTES = byte_tokenizer()
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "{{ message['role'][0] }}:{{ message['content'] }};{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)


def with_template() -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def alphabet(tokenizer: Any = BYTES) -> TableDecoder:
    """Says the alphabet from the letter behind the last one on; ``a`` after a colon."""
    table = script([*range(97, 123)], 257) + script([ord(":"), 97], 257) + script([122, 256], 257)
    return TableDecoder(table, DecoderFacts(stop_tokens=(256,), context=200), tokenizer)


# -- conversations -----------------------------------------------------------------------------------------------------


def test_a_chat_uses_the_template_and_keeps_its_cache() -> None:
    decoder = alphabet(with_template())
    chat = decoder.chat(system="be kind", max_new_tokens=3)
    assert chat.send("hello").text == "abc"
    found = chat.send("more")
    assert found.text == "abc"
    assert bytes(found.prompts[0]).decode() == "s:be kind;u:hello;a:abc;u:more;a:"
    # All of the first turn but the answer's last letter.
    assert found.counts.reused_tokens == len("s:be kind;u:hello;a:ab")
    assert [message["content"] for message in chat.messages] == ["be kind", "hello", "abc", "more", "abc"]
    chat.reset()
    assert chat.messages == [{"role": "system", "content": "be kind"}]
    assert bytes(chat.send("x").prompts[0]).decode() == "s:be kind;u:x;a:"


def test_a_chat_without_a_template_continues_the_text() -> None:
    chat = alphabet().chat(max_new_tokens=3)
    assert chat.send("xk").text == "lmn"
    found = chat.send("w", stop=())
    assert bytes(found.prompts[0]).decode() == "xklmn\nw"
    assert found.text == "xyz"
    found = chat.send("v", max_new_tokens=9)
    assert found.text == "wxyz"
    assert found.stopped == ("stop_token",)
    assert bytes(chat.send("a").prompts[0]).decode() == "xklmn\nwxyz\nvwxyz\na"  # without the end token


def test_a_cancelled_answer_stays_in_the_conversation() -> None:
    chat = alphabet().chat(max_new_tokens=20)
    with chat.stream("b") as stream:
        assert [next(stream), next(stream)] == ["c", "d"]
    assert chat.messages[-1] == {"role": "assistant", "content": "cd"}
    half = chat.stream("p")
    assert next(half) == "q"
    assert bytes(chat.send("a", max_new_tokens=1).prompts[0]).decode() == "bcd\npq\na"
    assert half.result.stopped == ("cancelled",)


def test_a_conversation_that_grows_too_long_is_refused_and_stays() -> None:
    chat = alphabet().chat(max_new_tokens=2, capacity=12)
    chat.send("abc")
    before = list(chat.messages)
    with pytest.raises(gw.InputError, match="12 is all that prompt and answer may have"):
        chat.send("much too long")
    assert chat.messages == before
    assert chat.send("d").text == "ef"


def test_bad_chats_are_refused() -> None:
    with pytest.raises(gw.InputError, match="needs a tokenizer"):
        TableDecoder(torch.eye(9)).chat()
    with pytest.raises(gw.InputError, match="no chat template"):
        alphabet().chat(system="x")
    with pytest.raises(gw.InputError, match="no option 'max_tokens'"):
        alphabet().chat(max_tokens=3)
    with pytest.raises(gw.InputError, match="is empty"):
        alphabet().chat().send("")
    chat = alphabet(with_template()).chat()
    chat.messages.append({"role": "tool", "content": ""})
    with pytest.raises(gw.InputError, match="template refuses this conversation: no tools"):
        chat.send("x")


# -- the command line --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of bytes as a Hugging Face folder."""
    path = tmp_path_factory.mktemp("decoder") / "model"
    make("llama", vocab_size=257, max_position_embeddings=64, eos_token_id=256).save_pretrained(path)
    BYTES.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def optimized(folder: Path) -> Path:
    """The same, optimised, as a saved Program with its tokenizer."""
    recipe = folder.parent / "r.toml"
    recipe.write_text('[[pass]]\nname = "cleanup"\n[[pass]]\nname = "fuse-rms-norm"\n')
    out = folder.parent / "out"
    given = ["optimize", str(folder), "--recipe", str(recipe), "-o", str(out), "--target", "reference"]
    assert main(given) == 0
    return out


@pytest.fixture(scope="module")
def packed(folder: Path) -> Path:
    """The same for the CPU, packed."""
    from graphwright.backends.cpu import features

    if features().selected is None:
        pytest.skip("needs the C++ kernels, which are not in this installation")
    recipe = folder.parent / "p.toml"
    recipe.write_text('[[pass]]\nname = "cleanup"\n')
    out = folder.parent / "packed"
    assert main(["optimize", str(folder), "--recipe", str(recipe), "-o", str(out), "--target", "cpu"]) == 0
    return out


@functools.cache
def decoder_of(folder: Path) -> Any:
    return gw.optimize(folder, verify=False)


def answer_of(folder: Path, prompt: str, count: int) -> str:
    text: str = decoder_of(folder).generate(prompt, max_new_tokens=count).text
    return text


def test_optimize_writes_a_decoder_with_its_tokenizer(optimized: Path, folder: Path) -> None:
    names = {path.name for path in optimized.iterdir()}
    assert names >= {"program.json", "model.safetensors", "decoder.json", "tokenizer.json", "report.json"}
    assert json.loads((optimized / "decoder.json").read_text()) == {
        "format": "graphwright decoder",
        "stop_tokens": [256],
        "context": 64,
    }
    assert not list(optimized.parent.glob(".*"))


def test_a_packed_decoder_is_loaded_with_its_tokenizer(packed: Path) -> None:
    names = {path.name for path in packed.iterdir()}
    assert "program.json" not in names
    for path in (packed, packed / "packed.safetensors"):
        loaded: Any = gw.load_packed(path)
        assert isinstance(loaded, gw.PackedDecoder)
        assert loaded.facts == DecoderFacts((256,), 64, packed)
        assert loaded.layout.vocabulary == 257
        assert loaded.tokenizer.decode([104, 105]) == "hi"
    alone = packed.parent / "alone"
    shutil.copy(packed / "packed.safetensors", alone)
    bare = gw.load_packed(alone)
    assert isinstance(bare, gw.PackedDecoder)
    assert bare.facts == DecoderFacts()


def test_generate_prints_the_answer(optimized: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = answer_of(folder, "hi", 12)
    reference = ["--target", "reference", "--max-new-tokens", "12"]
    assert main(["generate", str(folder), "hi", *reference]) == 0
    assert capsys.readouterr() == (wanted + "\n", "")
    for more in ([], ["--stream", "--draft", "prompt-lookup"], ["--draft", str(optimized)]):
        assert main(["generate", str(optimized), "hi", *reference, *more]) == 0
        assert capsys.readouterr() == (wanted + "\n", "")
    assert main(["generate", str(optimized), "hi", "you", *reference, "--json", "--temperature", "0.9"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [answer["stopped"] for answer in found["answers"]] == ["length", "length"]
    assert found["counts"]["new_tokens"] == 24
    seeded = [*reference, "--temperature", "0.9", "--seed", str(found["seed"]), "--top-p", "1", "--top-k", "0"]
    assert main(["generate", str(optimized), "hi", *seeded]) == 0
    assert capsys.readouterr().out == found["answers"][0]["text"] + "\n"


def test_generate_reads_the_prompt_from_a_pipe(
    optimized: Path, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hi"))
    assert main(["generate", str(optimized), "--max-new-tokens", "5", "--target", "reference"]) == 0
    assert capsys.readouterr().out == answer_of(folder, "hi", 5) + "\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{out}", "hi", "--top-p", "3"], "top_p"),
        (["{out}", "hi", "--max-new-tokens", "0"], "max_new_tokens"),
        (["{out}", "x" * 64], "has 64 tokens; 64 is all"),
        (["{out}", ""], "is empty"),
        (["{out}", "a", "b", "--stream"], "takes one prompt"),
        (["{out}", "hi", "--draft", "{none}"], "there is no such folder"),
        (["{out}", "hi", "--tokenizer", "{parent}"], "holds no tokenizer"),
        (["{none}", "hi"], "there is no such folder"),
        (["{parent}", "hi"], "is not a model folder"),
        (["{linear}", "hi"], "is no decoder"),
        (["{bare}", "hi"], "has no tokenizer"),
    ],
)
def test_generate_says_what_is_wrong(
    arguments: list[str], message: str, optimized: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"out": optimized, "none": tmp_path / "none", "parent": tmp_path, "linear": tmp_path / "linear"}
    places["bare"] = tmp_path / "bare"
    gw.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)).save(places["linear"])
    places["bare"].mkdir()
    for name in ("program.json", "model.safetensors", "decoder.json"):
        shutil.copy(optimized / name, places["bare"])
    given = [argument.format(**places) for argument in arguments]
    assert main(["generate", *given, "--target", "reference"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize("target", ["cuda", "cuda:compile"])
@pytest.mark.parametrize("command", ["generate", "optimize"])
def test_a_target_without_its_gpu_is_an_error(
    command: str, target: str, optimized: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    recipe = tmp_path / "empty.toml"
    recipe.write_text("[[pass]]\nname = 'remove-dead-code'\n", encoding="utf-8")
    rest = {"generate": ["hi"], "optimize": ["--recipe", str(recipe), "-o", str(tmp_path / "out"), "--no-verify"]}
    assert main([command, str(optimized), *rest[command], "--target", target]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "take target='cpu' on this machine" in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


@pytest.fixture
def chat(
    optimized: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """Run ``graphwright chat`` with these lines on stdin."""

    def run(*lines: str, options: tuple[str, ...] = ()) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        given = ["chat", str(optimized), "--target", "reference", "--max-new-tokens", "4", *options]
        code = main(given)
        return code, *capsys.readouterr()

    return run


def test_chat_from_a_pipe(chat: Callable[..., tuple[int, str, str]], folder: Path) -> None:
    first = answer_of(folder, "hi", 4)
    code, out, err = chat("hi", "", "/reset", "hi", "/what", "/quit", "never")
    assert (code, out) == (0, f"{first}\n{first}\n")
    assert "there is no /what" in err
    code, out, _ = chat("hi", "x")
    assert (code, out.startswith(f"{first}\n")) == (0, True)
    wanted = decoder_of(folder).chat(max_new_tokens=4)
    assert out == f"{wanted.send('hi').text}\n{wanted.send('x').text}\n"


def test_chat_says_what_is_wrong(chat: Callable[..., tuple[int, str, str]]) -> None:
    code, _, err = chat("hi", options=("--capacity", "2"))
    assert code == 2
    assert "2 is all that prompt and answer may have" in err
    code, out, err = chat("hi", options=("--system", "x"))
    assert (code, out) == (2, "")
    assert "no chat template" in err


def test_ctrl_c_cancels_the_answer_and_the_conversation_goes_on(
    chat: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from graphwright.backends.reference.session import ReferenceSession

    original, calls = ReferenceSession._step, [0]

    def interrupted(*given: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            raise KeyboardInterrupt
        return original(*given)

    monkeypatch.setattr(ReferenceSession, "_step", interrupted)
    code, out, _ = chat("hi", "again")
    assert code == 0
    assert "\n[cancelled]\n" in out
    assert out.endswith("\n")
    assert calls[0] > 4
