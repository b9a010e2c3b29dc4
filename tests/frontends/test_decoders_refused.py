"""What cannot be a decoding step is refused by name, before anything is traced wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.frontends.decoders import FAMILIES, make
from torch import nn

import graphwright as gw

transformers = pytest.importorskip("transformers")

SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
OLD = {"vocab_size": 97, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64, "bos_token_id": 1}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
NEO = {"vocab_size": 97, "hidden_size": 32, "num_layers": 1, "num_heads": 4, "attention_types": [[["global"], 1]]}

# name -> (configuration class, options, part of the reason)
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "encoder and decoder": (
        "T5Config",
        {"vocab_size": 97, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 4},
        "encoder-decoder",
    ),
    "attends across": ("GPT2Config", {**OLD, "add_cross_attention": True}, "attends across"),
    "recurrent": (
        "MambaConfig",
        {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 1},
        "layers of the kinds linear_attention",
    ),
    "latent attention": (
        "DeepseekV3Config",
        {**SMALL, **LATENT, "num_key_value_heads": 4, "n_routed_experts": 4, "first_k_dense_replace": 1},
        "latent attention",
    ),
    "sinks": (
        "GptOssConfig",
        {**SMALL, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1},
        "attention sinks",
    ),
    "chunks": (
        "Llama4TextConfig",
        {**SMALL, "head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 48},
        "layers of the kinds chunked_attention",
    ),
    "dynamic positions": (
        "LlamaConfig",
        {**SMALL, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
        r"rotary positions \(dynamic\) depend on the length",
    ),
    "long positions": (
        "Phi3Config",
        {
            **SMALL,
            "original_max_position_embeddings": 32,
            "rope_scaling": {"rope_type": "longrope", "long_factor": [2.0] * 4, "short_factor": [1.0] * 4},
        },
        r"rotary positions \(longrope\) depend on the length",
    ),
    "another attention": ("OpenAIGPTConfig", OLD, r"layers \[0\] do not attend through"),
    "a mask of its own": ("GPTNeoConfig", NEO, "cannot run with a cache of its own"),
    "two attentions": ("DiffLlamaConfig", SMALL, "attends twice"),
    "no positions": ("XLNetConfig", {"vocab_size": 97, "d_model": 32, "n_layer": 1, "n_head": 4}, "no position_ids"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_reason(name: str) -> None:
    kind, options, reason = REFUSED[name]
    factory: Any = (
        transformers.AutoModelForCausalLM if name != "encoder and decoder" else transformers.AutoModelForSeq2SeqLM
    )
    model = factory.from_config(getattr(transformers, kind)(**options)).eval()
    before = model.config._attn_implementation
    with pytest.raises(gw.TraceError, match=reason):
        gw.load_decoder(model)
    assert model.config._attn_implementation == before


def test_shared_caches_are_refused() -> None:
    model = make("llama")
    model.config.num_kv_shared_layers = 1
    with pytest.raises(gw.TraceError, match="share keys and values"):
        gw.load_decoder(model)


def test_bidirectional_attention_is_refused() -> None:
    model = make("gemma3", use_bidirectional_attention=True)
    with pytest.raises(gw.TraceError, match="mask"):
        gw.load_decoder(model)


def test_a_model_that_is_another_with_a_cache_is_refused() -> None:
    """A layer that looks at its neighbours within the call."""
    model = make("llama")
    inner = model.model.layers[0].mlp

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.inner(x) + nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]
            return result

    model.model.layers[0].mlp = Shifted()
    with pytest.raises(gw.TraceError, match="its logits are off by .* in steps with a cache"):
        gw.load_decoder(model)


def test_only_language_models() -> None:
    with pytest.raises(gw.InputError, match="generates text, got Linear"):
        gw.load_decoder(nn.Linear(2, 2))
    bert = transformers.BertModel(transformers.BertConfig(**{**SMALL, "num_hidden_layers": 1}))
    with pytest.raises(gw.InputError, match="generates text, got BertModel"):
        gw.load_decoder(bert)
    with pytest.raises(gw.InputError, match="argument 'dtype'"):
        gw.load_decoder(make("llama"), dtype="bfloat16")


def test_optimize_asks_for_examples_or_a_language_model() -> None:
    with pytest.raises(gw.InputError, match="example_inputs"):
        gw.optimize(nn.Linear(2, 2))
    with pytest.raises(gw.InputError, match="example_inputs"):
        gw.optimize("a folder", example_inputs=torch.ones(2))
    with pytest.raises(gw.InputError):
        gw.optimize("no such folder")
    assert "opt" in FAMILIES
