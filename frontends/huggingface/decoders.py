"""``load_decoder``: a causal language model as one graph of a step with a cache of keys and values."""

from __future__ import annotations

import os
from typing import Any

import torch

from graphwright.frontends.generation.facts import DecoderFacts
from graphwright.frontends.huggingface.loading import load_model
from graphwright.frontends.huggingface.quantized.modules import tag_quantized
from graphwright.frontends.huggingface.step.checking import check_model, check_program, find_caches
from graphwright.frontends.huggingface.step.families import family_of
from graphwright.frontends.huggingface.step.running import own_attention, step_model
from graphwright.frontends.huggingface.step.support import refuse_unsupported
from graphwright.frontends.torch.examples import unwrap
from graphwright.frontends.torch.tracing import trace
from graphwright.frontends.torch.untouched import untouched
from graphwright.ir.errors import InputError
from graphwright.ir.mapped import streaming
from graphwright.ir.program import Program

# Sizes to trace with; each differs from the others, as torch.export takes equal ones for the same.
_SLOTS, _CAPACITY = 4, 24


def load_decoder(source: Any, *, dtype: torch.dtype | str | None = None, check: bool = True) -> Program:
    """A causal language model as one graph of a decoding step, see :class:`graphwright.ir.decoder.DecoderLayout`.

    Prefill, single tokens and several tokens at once are calls of this same graph. It is called with ``input_ids``
    int64 ``[B, S]``, ``slots`` and ``starts`` int64 ``[B]``, ``rows`` int64 ``[B, K]`` and, for each layer, ``keys``
    and ``values`` ``[N, Hkv, C, D]``; it returns ``{"logits": [B, K, V], "keys": [...], "values": [...]}``.

    Args:
        source: a local folder (``config.json`` and safetensors, plain or quantised, see
            :func:`graphwright.load_huggingface`), or a live transformers model; the model is left as it was, and the
            Program shares its weights.
        dtype: of the weights of a folder; as stored by default.
        check: run a short text through the model, as it is and as a step, and the trace on several sizes, and compare.

    Raises:
        InputError: not a model folder, or not a transformers model that generates text.
        TraceError: the model cannot be a step (encoder-decoders, recurrent layers, latent attention, attention sinks,
            chunks, layers that share their cache, rotary positions that depend on the length), or does not compute the
            same as one.
    """
    if isinstance(source, str | os.PathLike):
        return trace_decoder(load_model(source, task="text-generation", dtype=dtype), check=check)
    if dtype is not None:
        raise InputError("is for folders; a live model has its own", where="argument 'dtype'")
    model = unwrap(source)
    if not is_language_model(model):
        raise InputError(
            f"expected a folder or a transformers model that generates text, got {type(source).__name__}",
            where="argument 'source'",
        )
    return trace_decoder(model, check=check)


def is_language_model(model: Any) -> bool:
    """Whether it is a transformers model that generates text."""
    is_pretrained = any(base.__name__ == "PreTrainedModel" for base in type(model).__mro__)
    return is_pretrained and bool(model.can_generate())


def trace_decoder(model: Any, *, check: bool = True) -> Program:
    """A step graph of a live model; see :func:`load_decoder`."""
    family = family_of(model)
    refuse_unsupported(model, family)
    with untouched(model):
        stepped = step_model(model, family)
        with torch.no_grad(), streaming(model.parameters()):
            caches = find_caches(model, family, _SLOTS, _CAPACITY)
            if check:
                check_model(model, stepped, caches, family)
        keys, values = caches
        vocabulary = model.config.get_text_config(decoder=True).vocab_size
        example = {
            "input_ids": torch.randint(0, vocabulary, (2, 5), generator=torch.Generator().manual_seed(0)),
            "slots": torch.tensor([2, 0]),
            "starts": torch.tensor([3, 1]),
            "rows": torch.tensor([[0, 2, 4], [1, 3, 4]]),
            "keys": keys,
            "values": values,
        }
        dynamic: dict[str, dict[int, str]] = {
            "input_ids": {0: "batch", 1: "tokens"},
            "slots": {0: "batch"},
            "starts": {0: "batch"},
            "rows": {0: "batch", 1: "selected"},
        }
        for layer in range(len(keys)):
            dynamic[f"keys.{layer}"] = dynamic[f"values.{layer}"] = {0: "slots", 2: "capacity"}
        with own_attention(model, family):
            program = trace(stepped, example, dynamic=dynamic, check=False)
        if check:
            with torch.no_grad(), streaming(model.parameters()):
                check_program(program, stepped, model, family)
    tag_quantized(program)
    program.origin = DecoderFacts.of_model(model)
    return program
