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

_LEAVES = {"lora_A.weight": "lora_A", "lora_B.weight": "lora_B"}
_EMBEDDED = {"lora_embedding_A": "lora_A", "lora_embedding_B": "lora_B"}
_MAGNITUDE = "lora_magnitude_vector"

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
    "use_dora",
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
    modules = folder.by_module({leaf: leaf for leaf in (*_LEAVES, *_EMBEDDED, _MAGNITUDE)})
    shapes = {path: _shapes(folder, path, tensors) for path, tensors in modules.items()}
    ops = tuple(op for op in OPS if any(each["op"] == op for each in shapes.values()))
    dora, stabilized = bool(folder.config.get("use_dora")), bool(folder.config.get("use_rslora"))
    sites: dict[str, SavedSite] = {}
    for path, tensors in modules.items():
        names = _names(shapes[path]["op"], dora)
        wanted(folder.source, path, tensors, *names)
        ours = {names[leaf]: tensors[leaf] for leaf in names}
        rank = int(ours["lora_A"].shape[0])
        alpha = float(folder.matched("alpha_pattern", path, folder.config.get("lora_alpha", 8)))
        kind = DoRA(rank, alpha, stabilized) if dora else LoRA(rank, alpha, stabilized, ops)
        sites[path] = SavedSite(kind, shapes[path], ours, {})
    first = next(iter(sites.values())).kind
    title = str(folder.config.get("base_model_name_or_path"))
    return SavedAdapter(folder.source, title, first, sites, folder.base())


def write(adapter: SavedAdapter) -> PeftFiles:
    """Configuration and tensors; a scale that is no ``alpha / rank`` of ours becomes the ``alpha`` that gives it."""
    kinds = {path: site.kind for path, site in adapter.sites.items()}
    rank, ranks = usual(kinds, lambda kind: kind.rank)
    stabilized = {kind.rank_stabilized for kind in kinds.values()}  # type: ignore[attr-defined]
    if len(stabilized) > 1:
        raise InputError("PEFT has one use_rslora for all modules", where=adapter.source)
    rslora, dora = stabilized.pop(), isinstance(adapter.kind, DoRA)
    alpha, alphas = usual(kinds, lambda kind: alpha_of(kind.alpha, scaling(kind.rank, 1.0, rank_stabilized=rslora)))
    config: dict[str, Any] = {
        "r": rank,
        "rank_pattern": ranks,
        "lora_alpha": alpha,
        "alpha_pattern": alphas,
        "use_rslora": rslora,
        "use_dora": dora,
        "bias": "none",
        "lora_dropout": 0.0,
        "target_modules": targets(adapter.sites),
    }
    tensors = {
        f"{PREFIX}{path}.{leaf}": site.tensors[name]
        for path, site in adapter.sites.items()
        for leaf, name in _names(site.shapes["op"], dora).items()
    }
    return PeftFiles(config, tensors)


def _names(op: str, dora: bool) -> dict[str, str]:
    """What stands behind a module's path -> our name."""
    return {**(_EMBEDDED if op == "embedding" else _LEAVES), **({_MAGNITUDE: "magnitude"} if dora else {})}


def _shapes(folder: PeftFolder, path: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """What the tensors say of the layer they are beside."""
    embedded = any(leaf in tensors for leaf in _EMBEDDED)
    leaves = _EMBEDDED if embedded else _LEAVES
    wanted(folder.source, path, tensors, *leaves)
    a, b = (tensors[leaf] for leaf in leaves)
    features = [int(b.shape[0]), int(a.shape[1])]
    op = "embedding" if embedded else "linear" if a.dim() == 2 else "conv"
    if folder.config.get("use_dora") and op != "linear":
        raise InputError(
            f"PEFT's option use_dora=True is not supported at the {op} {path}",
            where=folder.source,
            hint="train DoRA at linears only, or merge it with PEFT",
        )
    return {"op": op, "features": features, **({"kernel": list(a.shape[2:])} if op == "conv" else {})}
