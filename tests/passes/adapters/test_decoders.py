"""Adapters in language models, through preparation and quantisation to generated tokens."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
from tests.frontends.decoders import make

import graphwright as gw

PROMPTS = [[5, 9, 11, 40], [7, 3], [60, 2, 2, 31, 8]]
NEW = 6


@lru_cache
def peft_model() -> Any:
    """A small Llama with LoRA on queries and values, and the tokens that transformers makes with it."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(1)
    model = peft.get_peft_model(make("llama"), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.mul_(3)
    return model.eval()


def wanted(model: Any) -> tuple[tuple[int, ...], ...]:
    with torch.no_grad():
        made = [
            model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False)[
                0, len(prompt) :
            ].tolist()
            for prompt in PROMPTS
        ]
    return tuple(map(tuple, made))


def with_its_values(program: gw.Program, model: Any, name: str = "default") -> gw.Program:
    """The adapter's tensors as peft has them."""
    theirs = {
        key.removeprefix("base_model.model.").replace(".default.weight", f".{name}"): value
        for key, value in model.state_dict().items()
        if "lora_" in key
    }
    with torch.no_grad():
        for key, parameter in gw.adapter_parameters(program, name):
            parameter.copy_(theirs[key])
    return program


@lru_cache
def adapted() -> gw.Program:
    insert = gw.InsertAdapters(gw.LoRA(rank=4, alpha=8), where=("*q_proj", "*v_proj"))
    program = gw.optimize(gw.load_decoder(make("llama")), [insert])
    return with_its_values(program, peft_model())


@pytest.mark.parametrize("target", ["reference", "cpu"])
@pytest.mark.parametrize("merge", [False, True])
def test_prepared_it_generates_what_transformers_and_peft_do(target: str, merge: bool) -> None:
    passes: list[gw.Pass] = [*([gw.MergeAdapters()] if merge else []), gw.PrepareDecoder(length=64)]
    model = gw.optimize(adapted(), passes, target=target)
    assert isinstance(model, gw.OptimizedDecoder)
    paths = [gw.path_of(node) for node in model.nodes if gw.op_name(node) == "aten.linear"]
    assert sum(path.endswith("qkv_proj") for path in paths) == 2
    assert sum(path.endswith("gate_up_proj") for path in paths) == 2
    assert model.generate(PROMPTS, max_new_tokens=NEW).tokens == wanted(peft_model())
    assert model.generate(PROMPTS, max_new_tokens=NEW).tokens != wanted(make("llama"))


def test_on_a_quantised_base_it_stays_close() -> None:
    prepared = gw.optimize(adapted(), [gw.PrepareDecoder(length=64)])
    small = gw.optimize(prepared, [gw.QuantizeLinears(bits=8, group_size=16)], target="cpu")
    assert isinstance(small, gw.OptimizedDecoder)
    assert small.report.rows[-1].outputs["logits"]["original"]["relative"] < 0.05
    assert sum(gw.op_name(node) == "graphwright.linear_nbits" for node in small.nodes) == 8
    for name, tensor in gw.adapter_tensors(adapted(), "default").items():
        assert small.tensor(name) is tensor
    assert len(small.generate(PROMPTS, max_new_tokens=NEW).tokens) == len(PROMPTS)
