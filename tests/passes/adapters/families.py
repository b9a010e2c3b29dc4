"""Small transformers of several families, as Hugging Face has them, and batches for them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

import graphwright as gw

IDS = torch.tensor([[5, 9, 3, 7, 2, 11], [8, 1, 13, 4, 6, 10]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
BATCH = {"input_ids": IDS, "attention_mask": MASK}


def bert() -> torch.nn.Module:
    """BERT: norms after the sums."""
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    return _made(BertModel, BertConfig(**sizes, vocab_size=50, max_position_embeddings=32))


def gpt2() -> torch.nn.Module:
    """GPT-2: transposed weights, one linear for query, key and value."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
    return _made(GPT2LMHeadModel, GPT2Config(**sizes, vocab_size=50, bos_token_id=0, eos_token_id=0, use_cache=False))


def llama() -> torch.nn.Module:
    """Llama: gated feed-forward blocks, rotary positions, fewer keys than queries."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return _made(LlamaForCausalLM, LlamaConfig(**sizes, intermediate_size=48, vocab_size=50, use_cache=False))


def t5() -> torch.nn.Module:
    """T5's encoder: no biases, relative positions."""
    from transformers import T5Config, T5EncoderModel

    sizes = {"d_model": 32, "num_layers": 2, "num_heads": 4, "d_kv": 8, "d_ff": 48}
    return _made(T5EncoderModel, T5Config(**sizes, vocab_size=50))


FAMILIES: dict[str, Callable[[], torch.nn.Module]] = {"bert": bert, "gpt2": gpt2, "llama": llama, "t5": t5}


@functools.cache
def _traced(family: str) -> gw.Program:
    return gw.trace(FAMILIES[family](), BATCH)


def traced(family: str) -> gw.Program:
    """A program of a family; its weights are those that the family's function makes."""
    return _traced(family).clone()


def _made(model: Any, config: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    made: torch.nn.Module = model(config).eval()
    return made
