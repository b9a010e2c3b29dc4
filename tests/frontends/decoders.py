"""Small random language models of every family, and greedy decoding over a session."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from graphwright.backends.session import Session
from graphwright.frontends.huggingface import load_decoder
from graphwright.ir.program import Program

_SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,  # large enough for greedy decoding to say different things
}
_GROUPED = {**_SMALL, "num_key_value_heads": 2}
_WINDOW = {**_GROUPED, "sliding_window": 5}
_FALCON = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.3,
}

# name -> (configuration class, options)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {**_GROUPED, "tie_word_embeddings": True}),
    "mistral": ("MistralConfig", _WINDOW),
    "qwen2": ("Qwen2Config", _GROUPED),
    "qwen3": ("Qwen3Config", {**_GROUPED, "head_dim": 8}),
    "gemma": ("GemmaConfig", {**_GROUPED, "head_dim": 8}),
    "gemma2": ("Gemma2Config", {**_WINDOW, "head_dim": 8, "attn_logit_softcapping": 5.0}),
    "gemma3": (
        "Gemma3TextConfig",
        {**_WINDOW, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "phi": ("PhiConfig", _SMALL),
    "phi3": ("Phi3Config", {**_GROUPED, "sliding_window": None}),
    "gpt2": (
        "GPT2Config",
        {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.3},
    ),
    "gpt-neox": ("GPTNeoXConfig", {**_SMALL, "rotary_pct": 0.5}),
    "falcon-multi-query": ("FalconConfig", {**_FALCON, "new_decoder_architecture": False, "multi_query": True}),
    "falcon-grouped": ("FalconConfig", {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-alibi": (
        "FalconConfig",
        {
            **_FALCON,
            "new_decoder_architecture": False,
            "multi_query": False,
            "parallel_attn": False,
            "alibi": True,
            "bias": True,
        },
    ),
    "opt": ("OPTConfig", {**_SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.3}),
    "mpt": (
        "MptConfig",
        {"vocab_size": 97, "d_model": 32, "n_heads": 6, "n_layers": 2, "max_seq_len": 64, "initializer_range": 0.3}
        | {"d_model": 48},
    ),
    "bloom": (
        "BloomConfig",
        {"vocab_size": 97, "hidden_size": 48, "n_layer": 2, "n_head": 6, "initializer_range": 0.3},
    ),
}


def make(name: str, **changes: Any) -> Any:
    """A random model in eval mode."""
    import transformers

    kind, options = FAMILIES[name]
    special = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**{**special, **options, **changes})
    factory: Any = transformers.AutoModelForCausalLM
    return factory.from_config(config).eval()


@functools.cache
def traced(name: str) -> tuple[Any, Program]:
    """A model and its decoding step, not compared with each other, once for all tests: not to be written into."""
    model = make(name)
    return model, load_decoder(model, check=False)


def greedy(session: Session, prompts: Sequence[Sequence[int]], slots: Sequence[int], count: int) -> list[list[int]]:
    """The next ``count`` tokens of each prompt, all decoded together, each in its slot, without padding between."""
    at = torch.tensor(slots)
    longest = max(len(prompt) for prompt in prompts)
    tokens = torch.tensor([[*prompt, *[7] * (longest - len(prompt))] for prompt in prompts])
    ends = torch.tensor([len(prompt) for prompt in prompts])
    logits = session.step(tokens, at, torch.zeros_like(ends), ends.unsqueeze(1) - 1)
    found = [logits.argmax(2)]
    for _ in range(count - 1):
        logits = session.step(found[-1], at, ends, torch.zeros(len(prompts), 1, dtype=torch.int64))
        found.append(logits.argmax(2))
        ends = ends + 1
    result: list[list[int]] = torch.cat(found, dim=1).tolist()
    return result


def generate(model: Any, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """The same by transformers, on prompts padded to the left."""
    longest = max(len(prompt) for prompt in prompts)
    tokens = torch.tensor([[*[0] * (longest - len(prompt)), *prompt] for prompt in prompts])
    mask = torch.tensor([[*[0] * (longest - len(prompt)), *[1] * len(prompt)] for prompt in prompts])
    with torch.no_grad():
        made = model.generate(tokens, attention_mask=mask, max_new_tokens=count, do_sample=False)
    result: list[list[int]] = made[:, longest:].tolist()
    return result
