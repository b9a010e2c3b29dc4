"""Prompt and prefix tuning in PEFT's layout, both ways, with PEFT as the oracle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.passes.adapters.cases import stirred
from tests.passes.adapters.families import BATCH, FAMILIES, traced

import graphwright as gw
from graphwright.passes.adapters.files import load_adapter

peft = pytest.importorskip("peft")
TOKENS = 3
TASKS = {"bert": "FEATURE_EXTRACTION", "gpt2": "CAUSAL_LM", "llama": "CAUSAL_LM"}
PLACES = [("prompt", "bert"), ("prompt", "gpt2"), ("prompt", "llama"), ("prefix", "gpt2"), ("prefix", "llama")]
CONFIGS: dict[str, Any] = {"prompt": peft.PromptTuningConfig, "prefix": peft.PrefixTuningConfig}
KINDS: dict[str, gw.AdapterKind] = {
    "prompt": gw.PromptTuning(tokens=TOKENS),
    "prefix": gw.PrefixTuning(tokens=TOKENS),
}


def base(family: str) -> Any:
    model: Any = FAMILIES[family]()
    model.config.use_cache = True  # PEFT gives the prefix as a cache
    return model


def theirs(kind: str, family: str, folder: Path, **options: Any) -> Any:
    """A model with an adapter of PEFT's, which is saved."""
    torch.manual_seed(1)
    config = CONFIGS[kind](task_type=TASKS[family], num_virtual_tokens=TOKENS, **options)
    model = peft.get_peft_model(base(family), config).eval()
    model.save_pretrained(folder)
    return model


def text(kind: str, output: Any) -> torch.Tensor:
    """The places of the text: PEFT's outputs have the prompt's in front."""
    found: torch.Tensor = output[0].detach()
    return found[:, TOKENS:] if kind == "prompt" else found


def agree(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return found.shape == wanted.shape and bool((found - wanted).norm() <= 1e-5 * wanted.norm())


def inserted(family: str, adapter: Any, **options: Any) -> gw.Program:
    program = traced(family)
    assert gw.InsertAdapters(adapter, **options)(program)
    return program


@pytest.mark.parametrize(("kind", "family"), PLACES)
def test_both_ways(kind: str, family: str, tmp_path: Path) -> None:
    model = theirs(kind, family, tmp_path / "theirs")
    program = inserted(family, tmp_path / "theirs")
    with torch.no_grad():
        wanted, found = text(kind, model(**BATCH)), program(**BATCH)[0]
        assert agree(found, wanted)
        assert not agree(found, traced(family)(**BATCH)[0])
    gw.save_adapter(program, tmp_path / "ours", layout="peft")
    written, read = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert set(written) == set(read) == {"prompt_embeddings"}
    assert torch.equal(written["prompt_embeddings"], read["prompt_embeddings"])


@pytest.mark.parametrize(("kind", "family"), PLACES)
def test_made_here(kind: str, family: str, tmp_path: Path) -> None:
    program = inserted(family, KINDS[kind])
    stirred(program)
    gw.save_adapter(program, tmp_path, layout="peft")
    model = peft.PeftModel.from_pretrained(base(family), tmp_path).eval()
    assert model.peft_config["default"].task_type == TASKS[family]
    with torch.no_grad():
        found, wanted = text(kind, model(**BATCH)), program(**BATCH)[0]
        assert agree(found, wanted)
        assert not agree(found, traced(family)(**BATCH)[0])


def test_kept_in_our_layout_after_peft(tmp_path: Path) -> None:
    theirs("prefix", "llama", tmp_path / "theirs")
    program = inserted("llama", load_adapter(tmp_path / "theirs"))
    gw.save_adapter(program, tmp_path / "ours")
    again = inserted("llama", tmp_path / "ours")
    with torch.no_grad():
        assert torch.equal(again(**BATCH)[0], program(**BATCH)[0])


def configured(folder: Path, **options: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **options}))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("num_transformer_submodules", 2),
        ("task_type", "SEQ_CLS"),
        ("modules_to_save", ["lm_head"]),
        ("some_new_option", 3),
    ],
)
def test_options_that_are_refused(option: str, value: Any, tmp_path: Path) -> None:
    theirs("prefix", "gpt2", tmp_path)
    configured(tmp_path, **{option: value})
    with pytest.raises(gw.InputError, match=rf"{option}=.* is not supported for peft_type PREFIX_TUNING") as caught:
        load_adapter(tmp_path)
    assert repr(value) in str(caught.value)


def test_a_projected_prefix_is_what_the_projection_gave(tmp_path: Path) -> None:
    model = theirs("prefix", "gpt2", tmp_path, prefix_projection=True, encoder_hidden_size=5)
    with torch.no_grad():
        assert agree(inserted("gpt2", tmp_path)(**BATCH)[0], text("prefix", model(**BATCH)))


def test_how_a_prompt_started_does_not_matter(tmp_path: Path) -> None:
    theirs("prompt", "gpt2", tmp_path)
    configured(tmp_path, prompt_tuning_init="TEXT", prompt_tuning_init_text="a", tokenizer_name_or_path="nowhere")
    assert load_adapter(tmp_path).kind == gw.PromptTuning(tokens=TOKENS, init="normal")


def refitted(folder: Path, columns: int, **options: Any) -> None:
    """An adapter of another model: as many columns as its configuration says."""
    save_file({"prompt_embeddings": torch.ones(TOKENS, columns)}, folder / "adapter_model.safetensors")
    configured(folder, **options)


@pytest.mark.parametrize(
    ("kind", "columns", "options", "words"),
    [
        ("prompt", 16, {"token_dim": 16}, r"model.embed_tokens.prompt: \[3, 16\], not \[3, 32\]"),
        ("prefix", 96, {"num_layers": 3}, "has keys and values for 3 attentions, the program has a place .* at 2"),
        (
            "prefix",
            128,
            {"num_attention_heads": 4, "token_dim": 32},
            r"layers.1.self_attn.prefix_values: \[4, 3, 8\], not \[2, 3, 8\]",
        ),
        ("prefix", 64, {"num_attention_heads": 1}, r"prefix_keys: \[1, 3, 16\], not \[2, 3, 8\]"),
    ],
)
def test_adapters_of_other_models(kind: str, columns: int, options: dict[str, Any], words: str, tmp_path: Path) -> None:
    theirs(kind, "llama", tmp_path)
    refitted(tmp_path, columns, **options)
    program = traced("llama")
    before = str(program)
    with pytest.raises(gw.InputError, match=words):
        gw.InsertAdapters(tmp_path)(program)
    assert str(program) == before


def test_files_that_do_not_go_together(tmp_path: Path) -> None:
    theirs("prefix", "llama", tmp_path)
    configured(tmp_path, num_virtual_tokens=4)
    with pytest.raises(gw.SerializationError, match=r"is \[3, 64\], the configuration says \[4, 64\] with 2 heads"):
        load_adapter(tmp_path)
    configured(tmp_path, num_virtual_tokens=3, token_dim=None)
    with pytest.raises(gw.SerializationError, match="token_dim=None, where a number is needed"):
        load_adapter(tmp_path)
    save_file({"other": torch.ones(2)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(gw.SerializationError, match="'other' is none of peft_type PREFIX_TUNING"):
        load_adapter(tmp_path)
    save_file({}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(gw.SerializationError, match="there is no tensor prompt_embeddings"):
        load_adapter(tmp_path)


def test_a_prefix_at_some_attentions_is_nothing_that_peft_has(tmp_path: Path) -> None:
    program = inserted("llama", gw.PrefixTuning(tokens=TOKENS), where="*layers.0*")
    with pytest.raises(gw.InputError, match="goes to every attention, and model.layers.1.self_attn has none"):
        gw.save_adapter(program, tmp_path, layout="peft")
    theirs("prefix", "llama", tmp_path)
    with pytest.raises(gw.InputError, match="for 2 attentions, the program has a place for them at 1"):
        gw.InsertAdapters(tmp_path, where="*layers.0*")(traced("llama"))


def test_layers_that_are_one_module_have_one_prefix(tmp_path: Path) -> None:
    from transformers import AlbertConfig, AlbertModel

    sizes = {"hidden_size": 16, "embedding_size": 8, "intermediate_size": 16, "num_attention_heads": 2}
    made: Any = AlbertModel
    program = gw.trace(made(AlbertConfig(**sizes, num_hidden_layers=2, vocab_size=50)).eval(), BATCH)
    gw.InsertAdapters(gw.PrefixTuning(tokens=TOKENS))(program)
    with pytest.raises(gw.InputError, match=r"a prefix for every layer, and encoder.* is 2 of them"):
        gw.save_adapter(program, tmp_path, layout="peft")


def test_dept_is_not_written_as_a_prompt(tmp_path: Path) -> None:
    program = inserted("llama", gw.DePT(tokens=TOKENS, rank=2, max_length=9))
    with pytest.raises(gw.InputError, match="PEFT has no layout for the kind 'dept'"):
        gw.save_adapter(program, tmp_path, layout="peft")
