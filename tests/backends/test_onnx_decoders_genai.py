"""Folders for onnxruntime-genai: what is in them, and that it generates from them what the program does."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.frontends.decoders import greedy, make

import graphwright as gw
from graphwright.backends.onnx import export_genai, genai_config
from graphwright.backends.reference.session import ReferenceSession
from graphwright.frontends.huggingface import load_decoder
from graphwright.ir.errors import ExportError, InputError
from graphwright.ir.program import Program
from graphwright.passes.pipeline import run_passes

pytest.importorskip("transformers")

PROMPTS = [[5, 17, 30, 44, 3, 61, 80], [22, 71], [33, 2, 64, 19]]
ENDS = {"bos_token_id": 1, "eos_token_id": 94, "pad_token_id": 0}


@functools.cache
def small(bits: int | None) -> Program:
    program = load_decoder(make("llama", hidden_size=64), check=False)
    run_passes(program, [gw.PrepareDecoder(length=64)], [])
    if bits is not None:
        run_passes(program, [gw.QuantizeLinears(bits=bits, group_size=32)], [])
    return program


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A model's folder without weights: its configuration and a tokenizer of one word per token."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path / "source"
    make("llama", hidden_size=64, **ENDS).config.save_pretrained(folder)
    words = {f"w{index}": index for index in range(97)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


def genai() -> Any:
    return pytest.importorskip(
        "onnxruntime_genai", reason="needs onnxruntime-genai, which `make setup` installs from Python 3.11 on"
    )


def generated(folder: Path, prompts: list[list[int]], count: int, **options: Any) -> list[list[int]]:
    """The next tokens of each prompt by onnxruntime-genai, prompts filled up with the padding token."""
    library = genai()
    model = library.Model(str(folder))
    longest = max(map(len, prompts))
    settings = library.GeneratorParams(model)
    settings.set_search_options(max_length=longest + count, batch_size=len(prompts), do_sample=False, **options)
    generator = library.Generator(model, settings)
    generator.append_tokens([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts])
    while not generator.is_done():
        generator.generate_next_token()
    return [generator.get_sequence(row)[longest:].tolist() for row in range(len(prompts))]


# -- generating --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("logits", ["last", "all"])
def test_generates_what_the_program_does(bits: int | None, logits: str, source: Path, tmp_path: Path) -> None:
    """Prompts of different lengths in one batch, with caches that are shared and that are not."""
    genai()
    folder = tmp_path / "model"
    export_genai(small(bits), folder, source=source, tokenizer=False, logits=logits, check=logits == "last")
    wanted = greedy(ReferenceSession(small(bits), slots=3, capacity=24), PROMPTS, [0, 1, 2], 12)
    assert not any(ENDS["eos_token_id"] in row for row in wanted), "choose another end"
    assert generated(folder, PROMPTS, 12) == wanted
    assert generated(folder, PROMPTS, 12, past_present_share_buffer=False) == wanted
    assert generated(folder, PROMPTS[:1], 12) == wanted[:1]


@pytest.mark.parametrize(
    ("name", "changes"),
    [("gemma2", {"head_dim": 16}), ("gpt2", {}), ("falcon-alibi", {})],
)
def test_other_families(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """Windows and softcap, learned positions, ALiBi."""
    genai()
    model = make(name, **changes)
    program = load_decoder(model, check=False)
    run_passes(program, [gw.PrepareDecoder(length=64)], [])
    wanted = greedy(ReferenceSession(program, slots=3, capacity=24), PROMPTS, [0, 1, 2], 12)
    unused = next(token for token in range(1, 97) if not any(token in row for row in wanted))
    model.config.eos_token_id = unused
    model.config.save_pretrained(tmp_path / "source")
    options: dict[str, Any] = {"source": tmp_path / "source", "tokenizer": False, "check": False}
    export_genai(program, tmp_path / "model", context_length=64, **options)
    assert generated(tmp_path / "model", PROMPTS, 12) == wanted


@pytest.mark.parametrize("bits", [None, 4])
def test_trained_model(bits: int | None, tinylm_dir: Path, tmp_path: Path) -> None:
    """From text to text, and then on with more text."""
    library = genai()
    passes: list[Any] = [gw.PrepareDecoder(length=512)]
    if bits is not None:
        passes.append(gw.QuantizeLinears(bits=bits, group_size=32, clip_search=False))
    program: Any = gw.optimize(load_decoder(tinylm_dir, dtype="float32", check=False), passes, verify=False)
    program.export_genai(tmp_path / "model", check=False)
    model = library.Model(str(tmp_path / "model"))
    tokenizer = library.Tokenizer(model)
    settings = library.GeneratorParams(model)
    settings.set_search_options(max_length=64)
    generator = library.Generator(model, settings)
    session = ReferenceSession(program, slots=1, capacity=64)
    held, last = 0, None
    for text in ("The president said that the", " But the people of"):
        given = tokenizer.encode(text).tolist()
        if last is not None:
            # onnxruntime-genai counts the last token that it generated, but has not fed it yet.
            generator.rewind_to(generator.token_count() - 1)
            given = [last, *given]
        generator.append_tokens([given])
        for _ in range(12):
            generator.generate_next_token()
            step = [torch.tensor(each) for each in ([given], [0], [held], [[len(given) - 1]])]
            last = int(session.step(*step).argmax())
            held, given = held + len(given), [last]
            assert int(generator.get_next_tokens()[0]) == last


# -- the folder --------------------------------------------------------------------------------------------------------


def test_what_is_written(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    export = gw.export_genai(small(4), folder, source=source)
    names = {"genai_config.json", "model.onnx", "model.onnx.data", "tokenizer.json", "tokenizer_config.json"}
    assert {each.name for each in folder.iterdir()} == names == {each.name for each in export.files}
    assert export.path == folder / "model.onnx"
    assert "GroupQueryAttention do_rotary=1" in str(export)
    assert {each.name for each in tmp_path.iterdir()} == {"model", "source"}
    config = json.loads((folder / "genai_config.json").read_text())
    model = config["model"]
    assert (model["type"], model["context_length"], model["vocab_size"]) == ("llama", 64, 97)
    assert {key: model[key] for key in ENDS} == ENDS
    decoder = model["decoder"]
    assert (decoder["head_size"], decoder["num_key_value_heads"], decoder["num_hidden_layers"]) == (16, 2, 2)
    assert decoder["inputs"]["past_key_names"] % 1 in export.input_names
    assert config["search"]["max_length"] == 64


def test_an_earlier_export_is_replaced_and_nothing_else(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    export_genai(small(None), folder, source=source, check=False, context_length=32)
    (folder / "left over").touch()
    export_genai(small(None), folder, source=source, check=False)
    assert not (folder / "left over").exists()
    assert json.loads((folder / "genai_config.json").read_text())["model"]["context_length"] == 64
    for other in (source, source / "config.json"):
        before = sorted(source.iterdir())
        with pytest.raises(ExportError, match="other things|not a folder"):
            export_genai(small(None), other, source=source, check=False)
        assert sorted(source.iterdir()) == before


def test_nothing_is_left_of_a_failure(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("graphwright.backends.onnx.genai.shutil.copyfile", fail)
    with pytest.raises(ExportError, match="No space left"):
        export_genai(small(None), tmp_path / "model", source=source, check=False)
    assert [each.name for each in tmp_path.iterdir()] == ["source"]
    with pytest.raises(ExportError, match="does not exist"):
        export_genai(small(None), tmp_path / "none" / "model", source=source)


# -- the configuration -------------------------------------------------------------------------------------------------

_CONFIG = {"model_type": "llama", "max_position_embeddings": 64, "eos_token_id": [3, 4]}


def test_generation_config_goes_before_the_model_config() -> None:
    found = genai_config(small(None), _CONFIG, {"eos_token_id": 5, "top_k": 20, "do_sample": True, "top_p": None})
    assert (found["model"]["eos_token_id"], found["model"]["pad_token_id"], found["model"]["bos_token_id"]) == (5, 5, 5)
    assert (found["search"]["top_k"], found["search"]["do_sample"], found["search"]["top_p"]) == (20, True, 1.0)
    assert genai_config(small(None), _CONFIG)["model"]["eos_token_id"] == [3, 4]


def test_unknown_families_are_decoders() -> None:
    assert genai_config(small(None), {**_CONFIG, "model_type": "falcon"})["model"]["type"] == "decoder"
    nested = {"model_type": "gemma3", "text_config": {**_CONFIG, "model_type": "gemma3_text"}}
    assert genai_config(small(None), nested)["model"]["type"] == "gemma3_text"


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        ({"n_positions": 64}, {}, "no 'eos_token_id'"),
        ({"n_positions": 64, "eos_token_id": 1}, {"context_length": 65}, "more than the model's 64"),
    ],
)
def test_configuration_that_does_not_do(config: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        genai_config(small(None), config, **options)


def test_context_length() -> None:
    """What the configuration says, no more than the program has positions for."""
    assert genai_config(small(None), {**_CONFIG, "max_position_embeddings": 4096})["model"]["context_length"] == 64
    assert genai_config(small(None), {**_CONFIG, "max_position_embeddings": 32})["model"]["context_length"] == 32
    assert genai_config(small(None), _CONFIG, context_length=20)["search"]["max_length"] == 20
    unlimited = load_decoder(make("llama", hidden_size=64), check=False)
    with pytest.raises(InputError, match="no context length"):
        genai_config(unlimited, {"eos_token_id": 1})


def test_missing_files(source: Path, tmp_path: Path) -> None:
    optimized: Any = gw.optimize(make("llama", hidden_size=64), verify=False)
    with pytest.raises(InputError, match="not loaded from a folder"):
        optimized.export_genai(tmp_path / "model")
    (source / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="no tokenizer"):
        export_genai(small(None), tmp_path / "model", source=source)
    (source / "config.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read as JSON"):
        export_genai(small(None), tmp_path / "model", source=source, tokenizer=False)
    with pytest.raises(InputError, match="no such file"):
        export_genai(small(None), tmp_path / "model", source=tmp_path)
    with pytest.raises(InputError, match="'rows'|rows"):
        export_genai(small(None), tmp_path / "model", source=source, logits="rows")


def test_a_program_without_a_cache(source: Path, tmp_path: Path) -> None:
    program = gw.trace(torch.nn.Linear(3, 4), torch.randn(2, 3))
    with pytest.raises(ExportError, match="has no cache"):
        export_genai(program, tmp_path / "model", source=source)
    assert not (tmp_path / "model").exists()
