"""Small transformers models that give a loss."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

import graphwright as gw

WORDS = 61


def classifier() -> nn.Module:
    """A BERT of two classes, without dropout."""
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=WORDS, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4
    )
    model: nn.Module = transformers.BertForSequenceClassification(config)
    model.train(False)
    return model


def language_model() -> nn.Module:
    """A Llama."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=WORDS,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model: nn.Module = transformers.LlamaForCausalLM(config)
    model.train(False)
    return model


def batch_for(model: nn.Module, rows: int = 4, length: int = 9) -> dict[str, Any]:
    """Arguments with labels: the class is whether the first token is low; texts repeat one token."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, WORDS, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    if type(model).__name__.startswith("Llama"):
        ids[:, 1:] = ids[:, :1]
        return {"input_ids": ids, "attention_mask": mask, "labels": ids, "use_cache": False}
    mask[1, length // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": (ids[:, 0] < WORDS // 2).long()}


MODELS = {"bert": classifier, "llama": language_model}


@functools.cache
def _traced(name: str) -> gw.Program:
    model = MODELS[name]()
    return gw.trace(model, batch_for(model))


def traced(name: str) -> gw.Program:
    """A program that returns the loss, of the model of a name; its weights are not to be written into."""
    return _traced(name).clone()
