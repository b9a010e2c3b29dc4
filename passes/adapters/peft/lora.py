"""``peft_type`` LORA: LoRA with its scalings and ranks per module."""

from __future__ import annotations

import dataclasses
from typing import Any

from graphwright.ir.errors import InputError
from graphwright.passes.adapters.files import SavedAdapter, SavedSite
from graphwright.passes.adapters.kinds.lora import LoRA
from graphwright.passes.adapters.peft.folder import PREFIX, PeftFiles, PeftFolder, targets, usual, wanted

_LEAVES = {"lora_A.weight": "lora_A", "lora_B.weight": "lora_B"}

# read here, or without a meaning once training is over
_KNOWN = (
    "alpha_pattern",
    "corda_config",
    "eva_config",
    "fan_in_fan_out",  # follows from how the base stores its weights
    "init_lora_weights",
    "loftq_config",
    "lora_alpha",
    "lora_dropout",
    "lora_ga_config",
    "qalora_group_size",  # of use_qalora, which is refused
    "r",
    "rank_pattern",
    "use_rslora",
)
# These starts write other values into the base's weights, which PEFT's folder does not say.
_CHANGE_THE_BASE = ("corda", "loftq", "lora_ga", "olora", "pissa")


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
    sites: dict[str, SavedSite] = {}
    for path, tensors in folder.by_module(_LEAVES).items():
        wanted(folder.source, path, tensors, "lora_A", "lora_B")
        a, b = tensors["lora_A"], tensors["lora_B"]
        alpha = float(folder.matched("alpha_pattern", path, folder.config.get("lora_alpha", 8)))
        kind = LoRA(int(a.shape[0]), alpha, bool(folder.config.get("use_rslora")))
        sites[path] = SavedSite(kind, {"op": "linear", "features": [b.shape[0], a.shape[1]]}, tensors, {})
    first = next(iter(sites.values())).kind
    return SavedAdapter(folder.source, str(folder.config.get("base_model_name_or_path")), first, sites)


def write(adapter: SavedAdapter) -> PeftFiles:
    """Configuration and tensors; a scale that is no ``alpha / rank`` of ours becomes the ``alpha`` that gives it."""
    kinds = {path: site.kind for path, site in adapter.sites.items()}
    rank, ranks = usual(kinds, lambda kind: kind.rank)
    alpha, alphas = usual(kinds, _alpha)
    config: dict[str, Any] = {
        "r": rank,
        "rank_pattern": ranks,
        "lora_alpha": alpha,
        "alpha_pattern": alphas,
        "use_rslora": getattr(adapter.kind, "rank_stabilized", False),
        "bias": "none",
        "lora_dropout": 0.0,
        "target_modules": targets(adapter.sites),
    }
    tensors = {
        f"{PREFIX}{path}.{leaf}": site.tensors[name]
        for path, site in adapter.sites.items()
        for leaf, name in _LEAVES.items()
    }
    return PeftFiles(config, tensors)


def _alpha(kind: LoRA) -> float:
    """``lora_alpha`` that gives the kind's scale, whole where it can be."""
    alpha = kind.alpha if kind.alpha is not None else dataclasses.replace(kind, alpha=1.0).scale ** -1
    return int(alpha) if float(alpha).is_integer() else alpha
