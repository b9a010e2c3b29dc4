"""``graphwright auto-quantize``: a search from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from graphwright.frontends.cli.main import main
from graphwright.ir.names import op_name
from graphwright.ir.program import Program

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

WORDS = tuple(f"word{number}" for number in range(20))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama with a tokenizer of words, a text, and a file with functions that judge."""
    folder = tmp_path_factory.mktemp("search")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=22,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=48,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "llama")
    words = {word: index for index, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]")
    fast.save_pretrained(folder / "llama")
    lines = [" ".join(WORDS[start:] + WORDS[:start]) for start in range(len(WORDS))]
    (folder / "text.txt").write_text("\n".join(lines * 4))
    (folder / "judges.py").write_text(
        "import torch\n"
        "def even(model):\n"
        "    ids = torch.arange(8).unsqueeze(0)\n"
        "    return -float(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.square().mean())\n"
        "def never(model):\n"
        "    never.calls = getattr(never, 'calls', 0) + 1\n"
        "    return 1.0 if never.calls == 1 else 0.0\n"
        "number = 3\n"
    )
    (folder / "broken.py").write_text("import nothing_of_that_name\n")
    return folder


def run(place: Path, out: Path, *options: str) -> int:
    return main(["auto-quantize", str(place / "llama"), "-o", str(out), "--target", "reference", *options])


def test_perplexity_of_a_text(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    options = ("--text", str(place / "text.txt"), "--windows", "2", "--loss", "0.2", "--json")
    assert run(place, out, *options) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found["met"]
    assert found["rows"][0][1] == "original"
    program = Program.load(out / "model")
    assert "graphwright.linear_nbits" in {op_name(node) for node in program.nodes}
    assert {"search.html", "recipe.toml", "model"} <= {path.name for path in out.iterdir()}
    # The score is the perplexity: of a text without structure about the size of the vocabulary.
    assert 15 < float(found["rows"][0][2]) < 35
    # Started again, it goes on from the journal and does nothing twice.
    assert run(place, out, *options) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == found["rows"]


def test_a_function_of_a_file(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = f"{place / 'judges.py'}:even"
    assert run(place, tmp_path / "out", "--evaluate", given, "--higher-is-better", "--loss", "0.5") == 0
    assert "chosen" in capsys.readouterr().out


def test_a_target_that_nothing_meets(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = f"{place / 'judges.py'}:never"
    options = ("--evaluate", given, "--higher-is-better", "--time-limit", "2", "--json")
    assert run(place, tmp_path / "out", *options) == 1
    assert not json.loads(capsys.readouterr().out)["met"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--evaluate", "judges.py"], "names no file"),
        (["--evaluate", "{place}/judges.py:absent"], "no function 'absent'"),
        (["--evaluate", "{place}/judges.py:number"], "no function 'number'"),
        (["--evaluate", "{place}/broken.py:f"], "ModuleNotFoundError"),
        (["--text", "{place}/none.txt"], "--text"),
        (["--text", "{place}/judges.py"], "less than one window of 512"),
        (["--text", "{place}/text.txt", "--higher-is-better"], "perplexity is better lower"),
        (["--text", "{place}/text.txt", "--windows", "0"], "must be at least 1"),
        (["--text", "{place}/text.txt", "--loss", "-1"], "at least 0"),
        (["--text", "{place}/text.txt", "--target", "abacus"], "abacus"),
    ],
)
def test_mistakes(
    options: list[str], words: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [option.replace("{place}", str(place)) for option in options]
    kept = [*given, "--target", "reference"] if "--target" not in given else given
    assert main(["auto-quantize", str(place / "llama"), "-o", str(tmp_path / "out"), *kept]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
