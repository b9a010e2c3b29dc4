"""``peft_type`` PROMPT_TUNING and PREFIX_TUNING: one tensor for the whole model, that names no module.

The places it belongs to are the program's: the look-up of the tokens, or all attentions in the order in which they run.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from graphwright.ir.errors import InputError, SerializationError
from graphwright.ir.program import Program
from graphwright.ir.provenance import path_of
from graphwright.passes.adapters.base import AdapterKind
from graphwright.passes.adapters.files import SavedAdapter, SavedSite
from graphwright.passes.adapters.kinds.prefix import PrefixTuning, attentions
from graphwright.passes.adapters.kinds.prompt import PromptTuning
from graphwright.passes.adapters.peft.folder import PeftFiles, PeftFolder
from graphwright.passes.adapters.sites import Site

_TENSOR = "prompt_embeddings"
# read here, or about how the vectors started, or about a model that is there anyway
_KNOWN = (
    "encoder_hidden_size",
    "num_attention_heads",
    "num_layers",
    "num_virtual_tokens",
    "prefix_projection",  # of training alone: what is saved is what the projection gave
    "prompt_tuning_init",
    "prompt_tuning_init_text",
    "token_dim",
    "tokenizer_kwargs",
    "tokenizer_name_or_path",
)
# Others bring layers of their own, or have an encoder and a decoder.
_TASKS = (None, "CAUSAL_LM", "FEATURE_EXTRACTION")


def read(folder: PeftFolder) -> SavedAdapter:
    """The adapter of a folder; the program that it is put into says where its rows go."""
    config = folder.config
    if config.get("task_type") not in _TASKS:
        raise folder.refused("task_type", "supported: CAUSAL_LM, FEATURE_EXTRACTION")
    if config.get("num_transformer_submodules") not in (None, 1):
        raise folder.refused("num_transformer_submodules", "a model with an encoder and a decoder is not supported")
    folder.check_options((*_KNOWN, "num_transformer_submodules"))
    for name in folder.tensors:
        if name != _TENSOR:
            raise folder.unknown(name)
    if _TENSOR not in folder.tensors:
        raise SerializationError(f"there is no tensor {_TENSOR}", where=folder.source)
    whole = folder.tensors[_TENSOR]
    prefix = config["peft_type"] == "PREFIX_TUNING"
    tokens, width = _number(folder, "num_virtual_tokens"), _number(folder, "token_dim")
    layers, heads = (_number(folder, name) for name in ("num_layers", "num_attention_heads")) if prefix else (1, 1)
    columns = layers * 2 * width if prefix else width
    if list(whole.shape) != [tokens, columns] or width % heads:
        raise SerializationError(
            f"tensor {_TENSOR} is {list(whole.shape)}, the configuration says [{tokens}, {columns}]"
            + (f" with {heads} heads" if prefix else ""),
            where=folder.source,
            hint="the two files are not of the same adapter",
        )
    kind: AdapterKind
    if prefix:
        kind = PrefixTuning(tokens)
        parts = whole.view(tokens, layers, 2, heads, width // heads).permute(1, 2, 3, 0, 4)
        place = functools.partial(_prefix_sites, folder.source, kind, parts)
    else:
        kind = PromptTuning(tokens, init="normal")  # which needs no vocabulary
        place = functools.partial(_prompt_sites, kind, whole)
    return SavedAdapter(folder.source, str(config.get("base_model_name_or_path")), kind, {}, place=place)


def write(adapter: SavedAdapter, program: Program) -> PeftFiles:
    """Configuration and tensor.

    PEFT does nothing with a prompt unless it is told a task: CAUSAL_LM where the traced module's class is named so
    (``…ForCausalLM``, ``…LMHeadModel``), FEATURE_EXTRACTION for others, which lets any model run, but not generate.

    Args:
        adapter: with the sites that it has in the program.
        program: that it is part of.
    """
    causal = program.title.endswith(("CausalLM", "LMHeadModel"))
    config: dict[str, Any] = {
        "task_type": "CAUSAL_LM" if causal else "FEATURE_EXTRACTION",
        "num_transformer_submodules": 1,
    }
    if isinstance(adapter.kind, PrefixTuning):
        return _prefix_files(adapter, program, config)
    (site,) = adapter.sites.values()
    prompt = site.tensors["prompt"]
    return PeftFiles({**config, **_sizes(prompt)}, {_TENSOR: prompt.contiguous()})


def _prompt_sites(kind: AdapterKind, prompt: torch.Tensor, sites: Sequence[Site]) -> dict[str, SavedSite]:
    return {site.path: SavedSite(kind, {"op": site.op}, {"prompt": prompt}, {}) for site in sites}


def _prefix_sites(source: str, kind: AdapterKind, parts: torch.Tensor, sites: Sequence[Site]) -> dict[str, SavedSite]:
    """Keys and values of every attention.

    Args:
        source: for messages.
        kind: of all sites.
        parts: ``[layers, 2, heads, n, d_h]``.
        sites: the inputs, which have no tensors, then the attentions as they run.

    Raises:
        InputError: there are more attentions or fewer.
    """
    paths = [site.path for site in sites if site.op == PrefixTuning.kind]
    if sites and len(paths) != len(parts):
        raise InputError(
            f"tensor {_TENSOR} has keys and values for {len(parts)} attentions, the program has a place for them at "
            f"{len(paths)}",
            where=source,
            hint="insert it into the model that it was trained in, at all of its attentions",
            context=[*paths[:8], *(["…"] if len(paths) > 8 else [])],
        )
    tensors = {
        path: {"prefix_keys": keys, "prefix_values": values} for path, (keys, values) in zip(paths, parts, strict=False)
    }
    return {site.path: SavedSite(kind, {"op": site.op}, tensors.get(site.path, {}), {}) for site in sites}


def _prefix_files(adapter: SavedAdapter, program: Program, config: Mapping[str, Any]) -> PeftFiles:
    places = {path: site.tensors for path, site in adapter.sites.items() if site.tensors}
    calls = Counter(path_of(node) for node in attentions(program))
    for path, count in calls.items():
        if path not in places:
            raise InputError(
                f"PEFT's prefix goes to every attention, and {path} has none",
                where=adapter.source,
                hint="insert it without where= and ignore=, or leave layout= out",
            )
        if count > 1:
            raise InputError(
                f"PEFT has a prefix for every layer, and {path} is {count} of them with the same one",
                where=adapter.source,
                hint="leave layout= out",
            )
    shapes = {path: tuple(tensors["prefix_keys"].shape) for path, tensors in places.items()}
    if len(set(shapes.values())) > 1:
        raise InputError(
            "PEFT has one shape of keys for all attentions",
            where=adapter.source,
            hint="leave layout= out",
            context=[f"{path}: {list(shape)}" for path, shape in list(shapes.items())[:8]],
        )
    pairs = [torch.stack([each["prefix_keys"], each["prefix_values"]]) for each in places.values()]
    parts = torch.stack(pairs)
    layers, _, heads, tokens, width = parts.shape
    whole = parts.permute(3, 0, 1, 2, 4).reshape(tokens, layers * 2 * heads * width)
    sizes = {"token_dim": heads * width, "num_layers": layers, "num_attention_heads": heads}
    return PeftFiles({**config, **_sizes(whole), **sizes, "prefix_projection": False}, {_TENSOR: whole})


def _sizes(whole: torch.Tensor) -> dict[str, int]:
    return {"num_virtual_tokens": int(whole.shape[0]), "token_dim": int(whole.shape[1])}


def _number(folder: PeftFolder, name: str) -> int:
    value = folder.config.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise SerializationError(
            f"the configuration has {name}={value!r}, where a number is needed",
            where=folder.source,
            hint="save the adapter again with PEFT's save_pretrained",
        )
    return value
