"""Small transformers models, and adapters that PEFT puts into them as the oracle of ours."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graphwright as gw

peft = pytest.importorskip("peft")
IDS = torch.arange(18).view(2, 9) % 50


def llama() -> nn.Module:
    """Linears without bias, of several shapes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model: nn.Module = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=24,
            intermediate_size=36,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            use_cache=False,
        )
    )
    return model.eval()


def bert() -> nn.Module:
    """Linears with bias."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    model: nn.Module = BertModel(
        BertConfig(vocab_size=64, hidden_size=24, intermediate_size=36, num_hidden_layers=2, num_attention_heads=4),
        add_pooling_layer=False,
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model.eval()


def gpt2() -> nn.Module:
    """Weights stored [in, out]."""
    from transformers import GPT2Config, GPT2Model

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_embd=24, n_layer=2, n_head=4, n_positions=32, use_cache=False)
    model: nn.Module = GPT2Model(config)
    return model.eval()


MODELS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "llama": (llama, ["q_proj", "v_proj", "up_proj", "down_proj"]),
    "bert": (bert, ["query", "value", "intermediate.dense"]),
    "gpt2": (gpt2, ["c_attn", "mlp.c_proj"]),
}


def first(output: Any) -> torch.Tensor:
    """The logits or hidden states of a model's output."""
    found: torch.Tensor = output[0]
    return found


def adapted(model: nn.Module, config: Any, seed: int = 1) -> Any:
    """A model with an adapter of PEFT's, its trained tensors moved away from where they started."""
    found = peft.get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in found.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return found


@functools.cache
def traced(build: Callable[[], nn.Module]) -> gw.Program:
    """A model's program, once for all tests."""
    return gw.trace(build(), {"input_ids": IDS})


def ours(build: Callable[[], nn.Module], adapter: Any, **options: Any) -> gw.OptimizedModel:
    """A fresh model with an adapter of ours, a kind or a folder."""
    return gw.optimize(
        traced(build), [gw.InsertAdapters(adapter, **options)], example_inputs={"input_ids": IDS}, verify=False
    )


def agree(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """To the rounding of a few layers in float32."""
    return bool((found - wanted).norm() <= 5e-6 * wanted.norm())


def check_read(build: Callable[[], nn.Module], config: Any, folder: Path) -> gw.OptimizedModel:
    """What PEFT saved gives the same outputs here, and saved by us again gives them in PEFT."""
    model = adapted(build(), config)
    model.save_pretrained(folder / "theirs")
    with torch.no_grad():
        wanted = first(model(input_ids=IDS))
        bare = first(build()(input_ids=IDS))
    assert (wanted - bare).norm() > 1e-3 * bare.norm()
    program = ours(build, folder / "theirs")
    assert agree(first(program(input_ids=IDS)).detach(), wanted)
    check_written(build, program, folder)
    return program


def check_written(build: Callable[[], nn.Module], program: gw.OptimizedModel, folder: Path) -> None:
    """What we save in PEFT's layout gives the same outputs there, and all of its tensors have a place there."""
    gw.save_adapter(program, folder / "ours", layout="peft")
    model = peft.PeftModel.from_pretrained(build(), folder / "ours").eval()
    with torch.no_grad():
        found = first(model(input_ids=IDS))
    assert agree(found, first(program(input_ids=IDS)).detach())
    kept = peft.get_peft_model_state_dict(model)
    from safetensors.torch import load_file

    written = load_file(folder / "ours" / "adapter_model.safetensors")
    # PEFT saves the base's tables along where embeddings are adapted.
    assert {name for name in kept if not name.endswith(("base_layer.weight", "lm_head.weight"))} == set(written)
