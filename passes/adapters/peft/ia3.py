"""``peft_type`` IA3; which side is rescaled follows from ``feedforward_modules``."""

from __future__ import annotations

import re
from typing import Any

from graphwright.ir.errors import SerializationError
from graphwright.passes.adapters.files import SavedAdapter, SavedSite
from graphwright.passes.adapters.kinds.ia3 import IA3
from graphwright.passes.adapters.peft.folder import PREFIX, PeftFiles, PeftFolder, targets

_KNOWN = ("fan_in_fan_out", "feedforward_modules", "init_ia3_weights")


def read(folder: PeftFolder) -> SavedAdapter:
    """The adapter of a folder."""
    folder.check_options(_KNOWN)
    sites: dict[str, SavedSite] = {}
    for path, tensors in folder.by_module({"ia3_l": "ia3_l"}).items():
        factors = tensors["ia3_l"]
        if factors.numel() != max(factors.shape):
            raise SerializationError(f"{path}.ia3_l is no vector: {list(factors.shape)}", where=folder.source)
        side = "input" if _is_feedforward(folder.config.get("feedforward_modules"), path) else "output"
        op = "linear" if factors.dim() == 2 else "conv"
        sites[path] = SavedSite(IA3(side, ("linear", "conv")), {"op": op}, {"ia3_l": factors.reshape(-1)}, {})
    first = next(iter(sites.values())).kind
    return SavedAdapter(folder.source, str(folder.config.get("base_model_name_or_path")), first, sites)


def write(adapter: SavedAdapter) -> PeftFiles:
    """Configuration and tensors."""
    inputs = [path for path, site in adapter.sites.items() if _side(site) == "input"]
    config: dict[str, Any] = {
        "target_modules": targets(adapter.sites),
        "feedforward_modules": targets(inputs) if inputs else [],
    }
    tensors = {}
    for path, site in adapter.sites.items():
        shape = [1, -1, *(1 for _ in site.shapes.get("kernel", ()))]
        if site.shapes["op"] == "linear" and _side(site) == "output":
            shape = [-1, 1]
        tensors[f"{PREFIX}{path}.ia3_l"] = site.tensors["ia3_l"].reshape(shape)
    return PeftFiles(config, tensors)


def _side(site: SavedSite) -> str:
    assert isinstance(site.kind, IA3)
    return site.kind.side


def _is_feedforward(modules: str | list[str] | None, path: str) -> bool:
    if isinstance(modules, str):
        return re.fullmatch(modules, path) is not None
    return any(path.endswith(name) for name in modules or ())
