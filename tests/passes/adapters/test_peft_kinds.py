"""LoKr, LoHa, IA3, DoRA and VeRA in PEFT's layout, both ways, with PEFT as the oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.passes.adapters.peft_models import MODELS, adapted, bert, check_read, check_written, llama, ours, peft

import graphwright as gw
from graphwright.passes.adapters.files import load_adapter

LINEARS = ["q_proj", "v_proj", "up_proj", "down_proj"]
CONFIGS: dict[str, tuple[str, Any]] = {
    "dora": ("llama", peft.LoraConfig(r=3, lora_alpha=6, use_dora=True, target_modules=LINEARS)),
    "dora-bias": ("bert", peft.LoraConfig(r=3, use_dora=True, target_modules=MODELS["bert"][1])),
    "dora-transposed": ("gpt2", peft.LoraConfig(r=3, use_dora=True, target_modules=MODELS["gpt2"][1])),
    "lokr": ("llama", peft.LoKrConfig(r=2, alpha=5, target_modules=LINEARS)),
    "lokr-both": ("bert", peft.LoKrConfig(r=1, decompose_both=True, target_modules=MODELS["bert"][1])),
    "lokr-factor": ("llama", peft.LoKrConfig(r=2, decompose_factor=5, target_modules=LINEARS)),
    "lokr-whole": ("llama", peft.LoKrConfig(r=9, rank_pattern={"q_proj": 2}, target_modules=LINEARS)),
    "loha": ("llama", peft.LoHaConfig(r=2, alpha=4, alpha_pattern={"q_proj": 1}, target_modules=LINEARS)),
    "ia3": (
        "llama",
        peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    ),
    "ia3-bias": ("bert", peft.IA3Config(target_modules=["value", "intermediate.dense"], feedforward_modules=[])),
    "ia3-transposed": (
        "gpt2",
        peft.IA3Config(target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"]),
    ),
    "oft": ("llama", peft.OFTConfig(oft_block_size=6, use_cayley_neumann=False, target_modules=LINEARS)),
    "oft-count": (
        "bert",
        peft.OFTConfig(r=3, oft_block_size=0, use_cayley_neumann=False, target_modules=MODELS["bert"][1]),
    ),
    "oft-series": ("llama", peft.OFTConfig(oft_block_size=6, target_modules=LINEARS)),
    "oft-series-3": (
        "bert",
        peft.OFTConfig(oft_block_size=4, num_cayley_neumann_terms=3, target_modules=MODELS["bert"][1]),
    ),
    "vera": ("llama", peft.VeraConfig(r=8, target_modules=LINEARS)),
    "vera-drawn": (
        "bert",
        peft.VeraConfig(r=8, save_projection=False, projection_prng_key=7, target_modules=MODELS["bert"][1]),
    ),
    "vera-transposed": ("gpt2", peft.VeraConfig(r=8, target_modules=MODELS["gpt2"][1])),
}


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_both_ways(name: str, tmp_path: Path) -> None:
    model, config = CONFIGS[name]
    check_read(MODELS[model][0], config, tmp_path)


MADE: dict[str, tuple[gw.AdapterKind, dict[str, Any]]] = {
    "dora": (gw.DoRA(rank=3, rank_stabilized=True, alpha=2), {}),
    "ia3": (gw.IA3(), {"*.down_proj": {"side": "input"}}),
    "loha": (gw.LoHa(rank=3), {"*.0.*": {"rank": 2}}),
    "lokr": (gw.LoKr(rank=3), {"*q_proj": {"rank": 9, "alpha": 2.5}}),
    "lora-fa": (gw.LoRAFA(rank=3), {}),
    "oft": (gw.OFT(block=4), {}),
    "oft-series": (gw.OFT(block=4, terms=2), {}),
    "vera": (gw.VeRA(rank=8, seed=2), {}),
}


@pytest.mark.parametrize("name", sorted(MADE))
def test_made_here(name: str, tmp_path: Path) -> None:
    kind, overrides = MADE[name]
    program = ours(llama, kind, where=["*q_proj", "*down_proj"], overrides=overrides)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in program.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    check_written(llama, program, tmp_path)


def test_options_that_peft_has_once(tmp_path: Path) -> None:
    program = ours(llama, gw.LoKr(rank=2), where=["*q_proj", "*up_proj"], overrides={"*q_proj": {"factor": 2}})
    with pytest.raises(gw.InputError, match=r"one decompose_factor for all modules, not \[-1, 2\]"):
        gw.save_adapter(program, tmp_path, layout="peft")
    program = ours(llama, gw.VeRA(rank=2, size=(50, 40)), where="*q_proj")
    with pytest.raises(gw.InputError, match=r"widest sides \[24, 24\], not of size=\[50, 40\]"):
        gw.save_adapter(program, tmp_path, layout="peft")


def test_oft_of_one_term_is_refused(tmp_path: Path) -> None:
    config = peft.OFTConfig(oft_block_size=6, num_cayley_neumann_terms=1, target_modules=["q_proj"])
    adapted(llama(), config).save_pretrained(tmp_path)
    with pytest.raises(gw.InputError, match="num_cayley_neumann_terms=1 is not supported"):
        load_adapter(tmp_path)


def test_a_damaged_file_says_what_it_lacks(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    adapted(bert(), peft.VeraConfig(r=4, target_modules=["query"])).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name: tensor for name, tensor in tensors.items() if "vera_A" not in name}, file)
    with pytest.raises(gw.SerializationError, match="base_model has no vera_A"):
        load_adapter(tmp_path)
    save_file({**tensors, "base_model.model.encoder.odd": torch.ones(2)}, file)
    with pytest.raises(gw.SerializationError, match=r"'base_model.model.encoder.odd' is none of peft_type VERA"):
        load_adapter(tmp_path)
