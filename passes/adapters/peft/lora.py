"""``peft_type`` LORA: LoRA and DoRA with their scalings and ranks per module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from graphwright.ir.errors import InputError
from graphwright.passes.adapters.files import SavedAdapter, SavedSite
from graphwright.passes.adapters.kinds.dora import DoRA
from graphwright.passes.adapters.kinds.lora import LoRA, scaling
from graphwright.passes.adapters.layers import OPS
from graphwright.passes.adapters.peft.folder import PREFIX, PeftFiles, PeftFolder, alpha_of, targets, usual, wanted
from graphwright.passes.adapters.peft.lora_base import STARTS, Beside, without_biases

_LEAVES = {"lora_A.weight": "lora_A", "lora_B.weight": "lora_B"}
_EMBEDDED = {"lora_embedding_A": "lora_A", "lora_embedding_B": "lora_B"}
_MAGNITUDE = "lora_magnitude_vector"
_BIAS = "lora_B.bias"

# read here, or without a meaning once training is over
_KNOWN = (
    "alpha_pattern",
    "bias",
    "corda_config",
    "eva_config",
    "fan_in_fan_out",  # follows from how the base stores its weights
    "init_lora_weights",
    "loftq_config",
    "lora_alpha",
    "lora_bias",
    "lora_dropout",
    "lora_ga_config",
    "qalora_group_size",  # of use_qalora, which is refused
    "r",
    "rank_pattern",
    "use_dora",
    "use_rslora",
)
# These starts write other values into the base's weights, which depend on data or random numbers.
_CHANGE_THE_BASE = ("corda", "loftq", "lora_ga", "pissa_niter")


def read(folder: PeftFolder) -> SavedAdapter:
    """The adapter of a folder; ranks are those of its tensors."""
    folder.check_options(_KNOWN)
    start = str(folder.config.get("init_lora_weights", True))
    if start.startswith(_CHANGE_THE_BASE):
        raise InputError(
            f"PEFT's option init_lora_weights={start!r} changes the base's weights",
            where=folder.source,
            hint="save it with PEFT's save_pretrained(folder, path_initial_model_for_weight_conversion=...), "
            "which makes a plain LoRA of it",
        )
    folder, biases = without_biases(folder)
    modules = folder.by_module({leaf: leaf for leaf in (*_LEAVES, *_EMBEDDED, _MAGNITUDE, _BIAS)})
    shapes = {path: _shapes(folder, path, tensors) for path, tensors in modules.items()}
    ops = tuple(op for op in OPS if any(each["op"] == op for each in shapes.values()))
    dora, stabilized = bool(folder.config.get("use_dora")), bool(folder.config.get("use_rslora"))
    if dora and (biases or start in STARTS or any(_BIAS in tensors for tensors in modules.values())):
        option = "lora_bias" if folder.config.get("lora_bias") else "bias" if biases else "init_lora_weights"
        raise folder.refused(option, "DoRA has no bias of its own and starts at the weights: merge it with PEFT")
    sites: dict[str, SavedSite] = {}
    for path, tensors in modules.items():
        biased = _BIAS in tensors or bool(folder.config.get("lora_bias"))
        names = _names(shapes[path]["op"], dora, biased)
        wanted(folder.source, path, tensors, *names)
        ours = {names[leaf]: tensors[leaf] for leaf in names}
        if dora:
            ours["magnitude"] = ours["magnitude"].flatten()
        rank = int(ours["lora_A"].shape[0])
        alpha = float(folder.matched("alpha_pattern", path, folder.config.get("lora_alpha", 8)))
        lora = LoRA(rank, alpha, stabilized, ops, biased)
        kind = DoRA(rank, alpha, stabilized, ops) if dora else lora
        sites[path] = SavedSite(kind, shapes[path], ours, {})
    first = next(iter(sites.values())).kind
    title = str(folder.config.get("base_model_name_or_path"))
    finish = Beside(folder.source, start if start in STARTS else "", biases) if biases or start in STARTS else None
    return SavedAdapter(folder.source, title, first, sites, folder.base(), finish=finish)


def write(adapter: SavedAdapter) -> PeftFiles:
    """Configuration and tensors; a scale that is no ``alpha / rank`` of ours becomes the ``alpha`` that gives it."""
    kinds = {path: site.kind for path, site in adapter.sites.items()}
    rank, ranks = usual(kinds, lambda kind: kind.rank)
    stabilized = {kind.rank_stabilized for kind in kinds.values()}  # type: ignore[attr-defined]
    if len(stabilized) > 1:
        raise InputError("PEFT has one use_rslora for all modules", where=adapter.source)
    rslora, dora = stabilized.pop(), isinstance(adapter.kind, DoRA)
    biased = any("lora_bias" in site.tensors for site in adapter.sites.values())
    if biased and any(site.shapes["op"] == "embedding" for site in adapter.sites.values()):
        raise InputError("PEFT has one lora_bias for all modules, and none at embeddings", where=adapter.source)
    alpha, alphas = usual(kinds, lambda kind: alpha_of(kind.alpha, scaling(kind.rank, 1.0, rank_stabilized=rslora)))
    config: dict[str, Any] = {
        "r": rank,
        "rank_pattern": ranks,
        "lora_alpha": alpha,
        "alpha_pattern": alphas,
        "use_rslora": rslora,
        "use_dora": dora,
        "bias": "none",
        "lora_bias": biased,
        "lora_dropout": 0.0,
        "target_modules": targets(adapter.sites),
    }
    tensors = {
        f"{PREFIX}{path}.{leaf}": _value(site, name)
        for path, site in adapter.sites.items()
        for leaf, name in _names(site.shapes["op"], dora, biased).items()
    }
    return PeftFiles(config, tensors)


def _names(op: str, dora: bool, biased: bool) -> dict[str, str]:
    """What stands behind a module's path -> our name."""
    more = {**({_MAGNITUDE: "magnitude"} if dora else {}), **({_BIAS: "lora_bias"} if biased else {})}
    return {**(_EMBEDDED if op == "embedding" else _LEAVES), **more}


def _value(site: SavedSite, name: str) -> torch.Tensor:
    """A tensor of a site in PEFT's shape."""
    if name == "lora_bias" and name not in site.tensors:  # PEFT has one lora_bias for all modules
        return site.tensors["lora_B"].new_zeros(site.shapes["features"][0])
    if name == "magnitude" and site.shapes["op"] == "conv":
        return site.tensors[name].view(1, -1, *(1,) * len(site.shapes["kernel"]))
    return site.tensors[name]


def _shapes(folder: PeftFolder, path: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """What the tensors say of the layer they are beside."""
    embedded = any(leaf in tensors for leaf in _EMBEDDED)
    leaves = _EMBEDDED if embedded else _LEAVES
    wanted(folder.source, path, tensors, *leaves)
    a, b = (tensors[leaf] for leaf in leaves)
    features = [int(b.shape[0]), int(a.shape[1])]
    op = "embedding" if embedded else "linear" if a.dim() == 2 else "conv"
    return {"op": op, "features": features, **({"kernel": list(a.shape[2:])} if op == "conv" else {})}
