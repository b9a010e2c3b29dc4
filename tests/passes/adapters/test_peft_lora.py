"""LoRA in PEFT's layout, both ways, with PEFT as the oracle."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.passes.adapters.peft_models import IDS, MODELS, adapted, check_read, check_written, first, llama, ours, peft
from torch import nn

import graphwright as gw
from graphwright.passes.adapters.files import load_adapter
from graphwright.passes.adapters.inserted import adapters_of
from graphwright.passes.adapters.peft.lora_base import Beside


@pytest.mark.parametrize("name", sorted(MODELS))
def test_plain(name: str, tmp_path: Path) -> None:
    build, targets = MODELS[name]
    program = check_read(build, peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets), tmp_path)
    kinds = {site.kind for site in adapters_of(program)["default"].sites.values()}
    assert kinds == {gw.LoRA(rank=4, alpha=6)}


OPTIONS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"layers.0.self_attn.q_proj": 6, "v_proj": 2},
        "alpha_pattern": {"^model.*up_proj": 3},
    },
    "dropout": {"lora_dropout": 0.3},
    "all": {"target_modules": "all-linear"},
    "regex": {"target_modules": r".*\.1\..*(q|v)_proj"},
    "layers": {"layers_to_transform": [1]},
}


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_options(name: str, tmp_path: Path) -> None:
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "up_proj"], **OPTIONS[name]}
    check_read(llama, peft.LoraConfig(**options), tmp_path)


@pytest.mark.parametrize("kind", [gw.LoRA(rank=3), gw.LoRA(rank=3, alpha=2.5), gw.LoRA(3, rank_stabilized=True)])
def test_made_here(kind: gw.LoRA, tmp_path: Path) -> None:
    program = ours(llama, kind, where="*q_proj", overrides={"*.layers.1.*": {"rank": 5}})
    with torch.no_grad():
        for parameter in program.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    check_written(llama, program, tmp_path)


def test_dora_at_an_embedding(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=3, lora_alpha=6, use_dora=True, target_modules=["embed_tokens", "q_proj"])
    program = check_read(llama, config, tmp_path)
    merged = gw.optimize(program, [gw.MergeAdapters()], example_inputs={"input_ids": IDS}, verify=False)
    with torch.no_grad():
        found, wanted = (first(each(input_ids=IDS)) for each in (merged, program))
    assert bool((found - wanted).norm() <= 5e-6 * wanted.norm())


def test_embeddings(tmp_path: Path) -> None:
    """PEFT saves the table along; ours must be the same one."""
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["embed_tokens", "q_proj"])
    program = check_read(llama, config, tmp_path)
    assert {site.kind.options()["ops"] for site in adapters_of(program)["default"].sites.values()} == {
        ("linear", "embedding")
    }

    def other() -> torch.nn.Module:
        model = llama()
        with torch.no_grad():
            model.get_parameter("model.embed_tokens.weight").add_(1.0)
        return model

    with pytest.raises(gw.InputError) as caught:
        ours(other, tmp_path / "theirs")
    assert "model.embed_tokens.weight: a weight of the base that was saved along" in str(caught.value)


BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "lora_bias": ("bert", {"lora_bias": True}),
    "lora_only": ("bert", {"bias": "lora_only"}),
    "both biases": ("bert", {"bias": "lora_only", "lora_bias": True, "use_rslora": True}),
    "pissa": ("llama", {"init_lora_weights": "pissa", "use_rslora": True}),
    "pissa, transposed": ("gpt2", {"init_lora_weights": "pissa"}),
    "olora": ("bert", {"init_lora_weights": "olora", "bias": "lora_only"}),
}


@pytest.mark.parametrize("name", sorted(BASES))
def test_what_training_changed_in_the_base_becomes_the_adapters(name: str, tmp_path: Path) -> None:
    model, options = BASES[name]
    build, targets = MODELS[model]
    program = check_read(build, peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, **options), tmp_path)
    for (weight, p), q in zip(build().named_parameters(), build().parameters(), strict=True):
        assert torch.equal(program.tensor(weight), p), weight
        assert torch.equal(p, q)
    merged = gw.optimize(program, [gw.MergeAdapters()], example_inputs={"input_ids": IDS}, verify=False)
    with torch.no_grad():
        found, wanted = (first(each(input_ids=IDS)) for each in (merged, program))
    assert bool((found - wanted).norm() <= 5e-6 * wanted.norm())


def test_biases_of_layers_without_adapter_are_refused(tmp_path: Path) -> None:
    build, targets = MODELS["bert"]
    adapted(build(), peft.LoraConfig(r=2, target_modules=targets, bias="all")).save_pretrained(tmp_path)
    with pytest.raises(gw.InputError, match="bias='all' is not supported") as caught:
        load_adapter(tmp_path)
    assert "belongs to a layer without adapter" in str(caught.value)


def test_starts_and_biases_need_the_layer_they_were_trained_with(tmp_path: Path) -> None:
    build, targets = MODELS["bert"]
    config = peft.LoraConfig(r=2, target_modules=targets, bias="lora_only")
    adapted(build(), config).save_pretrained(tmp_path / "biased")

    class Bare(nn.Module):
        """The layers of the same names, without biases."""

        def __init__(self) -> None:
            super().__init__()
            self.bert = build()
            for name, module in self.bert.named_modules():
                if isinstance(module, nn.Linear) and name.endswith(tuple(targets)):
                    module.register_parameter("bias", None)

        def forward(self, input_ids: torch.Tensor) -> Any:
            return self.bert(input_ids=input_ids)

    saved = load_adapter(tmp_path / "biased")
    moved = {f"bert.{path}": site for path, site in saved.sites.items()}
    assert isinstance(saved.finish, Beside)
    biases = {f"bert.{path}": bias for path, bias in saved.finish.biases.items()}
    finish = dataclasses.replace(saved.finish, biases=biases)
    with pytest.raises(gw.InputError, match=r"has a trained bias \[24\] for bert.encoder.* the program's is none"):
        ours(Bare, dataclasses.replace(saved, sites=moved, finish=finish))
    start = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa")
    adapted(llama(), start).save_pretrained(tmp_path / "start")
    passes = [gw.QuantizeLinears(bits=8), gw.InsertAdapters(tmp_path / "start")]
    with pytest.raises(gw.InputError, match="in floating point"):
        gw.optimize(llama(), passes, example_inputs={"input_ids": IDS}, verify=False)


def changed(folder: Path, **options: Any) -> Path:
    """A folder of PEFT's with other options."""
    adapted(llama(), peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **options}))
    return folder


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\]"),
        ({"use_qalora": True}, "use_qalora=True"),
        ({"lora_bias": True, "use_dora": True}, "q_proj has no lora_magnitude_vector"),
        ({"lora_bias": True}, "q_proj has no lora_B.bias"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4' changes the base"),
        ({"peft_type": "BOFT"}, "peft_type 'BOFT' is not supported"),
        ({"of_tomorrow": 3}, "of_tomorrow=3"),
    ],
)
def test_what_is_not_supported_is_named(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises((gw.InputError, gw.SerializationError), match=said):
        load_adapter(changed(tmp_path, **options))


def test_pickled_tensors_are_not_read(tmp_path: Path) -> None:
    adapted(llama(), peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(gw.SerializationError, match="pickled"):
        load_adapter(tmp_path)


def test_another_models_adapter_says_what_differs(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = changed(tmp_path)
    other: nn.Module = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=36,
            num_hidden_layers=1,
            num_attention_heads=4,
            use_cache=False,
        )
    )
    other.eval()
    with pytest.raises(gw.InputError) as caught:
        gw.optimize(other, [gw.InsertAdapters(folder)], example_inputs={"input_ids": IDS})
    said = str(caught.value)
    assert "model.layers.0.self_attn.q_proj: saved for {'op': 'linear', 'features': [24, 24]}" in said
    assert "model.layers.1.self_attn.q_proj: the program has no such layer" in said


def test_a_kind_that_peft_lacks(tmp_path: Path) -> None:
    program = ours(llama, gw.KronA(), where="*q_proj")
    with pytest.raises(gw.InputError, match="no layout for the kind 'krona'"):
        gw.save_adapter(program, tmp_path, layout="peft")
    with pytest.raises(gw.InputError, match="'graphwright' or 'peft'"):
        gw.save_adapter(program, tmp_path, layout="PEFT")
    assert not list(tmp_path.iterdir())


def test_a_path_means_itself_alone(tmp_path: Path) -> None:
    """PEFT would take a list's "q" for "inner.q" too."""

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.q = torch.nn.Linear(6, 6)
            self.inner = torch.nn.ModuleDict({"q": torch.nn.Linear(6, 6)})

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.inner["q"](self.q(x))
            return y

    x = torch.randn(3, 6)
    program = gw.optimize(Net(), [gw.InsertAdapters(gw.LoRA(2), where="q")], example_inputs=x)
    with torch.no_grad():
        for parameter in program.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    gw.save_adapter(program, tmp_path, layout="peft")
    model = peft.PeftModel.from_pretrained(Net(), tmp_path)
    assert torch.allclose(model(x), program(x), atol=1e-6)
    assert sum(p.numel() for n, p in model.named_parameters() if "lora" in n) == 24
    assert first((x,)) is x
