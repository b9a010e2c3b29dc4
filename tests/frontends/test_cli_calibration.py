"""``optimize --calibration``: a text file as calibration data."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from graphwright.frontends.cli.calibration import as_inputs, read_windows
from graphwright.frontends.cli.main import main
from graphwright.ir.program import Program

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

WORDS = tuple(f"word{number}" for number in range(20))
RECIPE = """
[[pass]]
name = "quantize-linears"
bits = 4
group_size = 16
rounding = { method = "gptq", damping = 0.05 }
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small BERT and a small Llama with a tokenizer of words, a recipe and a text."""
    place = tmp_path_factory.mktemp("calibration")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    transformers.BertModel(transformers.BertConfig(vocab_size=50, **sizes)).save_pretrained(place / "bert")
    config = transformers.LlamaConfig(vocab_size=50, num_key_value_heads=1, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(place / "llama")
    words = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]")
    for name in ("bert", "llama"):
        fast.save_pretrained(place / name)
    (place / "recipe.toml").write_text(RECIPE)
    lines = [" ".join(WORDS[start:] + WORDS[:start]) for start in range(len(WORDS))]
    (place / "text.txt").write_text("\n\n".join(lines))
    return place


def options(model: Path, text: str | None, samples: int | None = None, length: int | None = None) -> Any:
    return argparse.Namespace(
        model=str(model), calibration=text, calibration_samples=samples, calibration_length=length
    )


def test_a_language_model_is_given_windows(folders: Path) -> None:
    windows = read_windows(options(folders / "llama", str(folders / "text.txt"), 3, 8))
    assert windows is not None
    assert [window.shape for window in windows] == [(1, 8)] * 3
    assert windows[0].tolist() == [list(range(4, 12))]
    assert windows[2].tolist() == [[*range(20, 24), *range(5, 9)]]
    whole = read_windows(options(folders / "llama", str(folders / "text.txt"), None, 10))
    assert whole is not None
    assert len(whole) == len(WORDS) ** 2 // 10


def test_other_models_are_given_lines(folders: Path) -> None:
    windows = read_windows(options(folders / "bert", str(folders / "text.txt"), 4, 7))
    assert windows is not None
    assert [window.tolist() for window in windows[:2]] == [[[2, 4, 5, 6, 7, 8, 3]], [[2, 5, 6, 7, 8, 9, 3]]]
    assert len(windows) == 4


def test_optimize_with_a_text(folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("bert", "llama"):
        out = str(tmp_path / name)
        given = ["--recipe", str(folders / "recipe.toml"), "-o", out, "--no-verify", "--json"]
        text = ["--calibration", str(folders / "text.txt"), "--calibration-length", "16"]
        assert main(["optimize", str(folders / name), *given, *text, "--calibration-samples", "12"]) == 0
        (row,) = json.loads(capsys.readouterr().out)["rows"]
        assert row["options"]["calibration"] == "12 batches"
        assert row["options"]["rounding"] == {"method": "gptq", "damping": 0.05}
        assert row["notes"]["linears"] >= 6
        assert any("qweight" in tensor for tensor in Program.load(out).tensors())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "needs calibration data (at quantize-linears: rounding='gptq')"),
        (["--calibration", "nowhere.txt"], "cannot be read as text"),
        (["--calibration", "short.txt"], "holds 3 tokens, less than one window of 512"),
        (["--calibration", "short.txt", "--calibration-length", "0"], "must be at least 1, not 0"),
        (["--calibration", "short.txt", "--calibration-samples", "-2"], "option --calibration-samples"),
        (["--calibration-samples", "4"], "goes with --calibration FILE.txt"),
        (["--calibration", "picture.bin"], "cannot be read as text"),
    ],
)
def test_errors(
    folders: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    given: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("short.txt").write_text("word1 word2 word3")
    Path("picture.bin").write_bytes(b"\xff\xfe\xfd\x00\x80")
    model = ["optimize", str(folders / "llama"), "--recipe", str(folders / "recipe.toml"), "-o", "out"]
    assert main([*model, *given]) == 2
    assert message in capsys.readouterr().err
    assert not Path("out").exists()


def test_recipes_and_models_that_cannot_use_it(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cleanup.toml").write_text('[[pass]]\nname = "cleanup"\n')
    (tmp_path / "blank.txt").write_text("\n \n")
    text = ["--calibration", str(folders / "text.txt"), "--calibration-length", "16"]
    command = ["optimize", str(folders / "llama"), "-o", str(tmp_path / "out")]
    assert main([*command, "--recipe", str(tmp_path / "cleanup.toml"), *text]) == 2
    assert "no pass of the recipe can use" in capsys.readouterr().err
    blank = ["--calibration", str(tmp_path / "blank.txt")]
    command = ["optimize", str(folders / "bert"), "-o", str(tmp_path / "out")]
    assert main([*command, "--recipe", str(folders / "recipe.toml"), *blank]) == 2
    assert "holds no text" in capsys.readouterr().err

    class Pictures:
        signature = argparse.Namespace(names=("pixel_values",))
        inputs = ()

    with pytest.raises(Exception, match="the model takes pixel_values"):
        as_inputs([torch.ones(1, 3)], Pictures())
