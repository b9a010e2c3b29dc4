"""``peft_type`` VERA: vectors of each module, and the shared matrices or the key they are drawn with."""

from __future__ import annotations

from graphwright.ir.errors import InputError
from graphwright.passes.adapters.files import SavedAdapter, SavedSite
from graphwright.passes.adapters.kinds.vera import VeRA
from graphwright.passes.adapters.peft.folder import PREFIX, PeftFiles, PeftFolder, targets, wanted

_VECTORS = ("vera_lambda_b", "vera_lambda_d")
_SHARED = ("vera_A", "vera_B")
_KNOWN = ("d_initial", "fan_in_fan_out", "projection_prng_key", "r", "save_projection", "vera_dropout")


def read(folder: PeftFolder) -> SavedAdapter:
    """The adapter of a folder."""
    folder.check_options(_KNOWN)
    named = {name.removeprefix("base_model."): tensor for name, tensor in folder.tensors.items()}
    shared = {name: named[name] for name in _SHARED if name in named}
    modules = PeftFolder(
        folder.source,
        folder.config,
        {name: tensor for name, tensor in folder.tensors.items() if name.removeprefix("base_model.") not in shared},
    ).by_module({name: name for name in _VECTORS})
    saved = bool(folder.config.get("save_projection", True))
    if saved:
        wanted(folder.source, "base_model", shared, *_SHARED)
    kind = VeRA(
        int(folder.config.get("r", 256)),
        float(folder.config.get("d_initial", 0.1)),
        int(folder.config.get("projection_prng_key", 0)),
        (int(shared["vera_B"].shape[0]), int(shared["vera_A"].shape[1])) if saved else None,
        saved,
    )
    sites: dict[str, SavedSite] = {}
    for path, tensors in modules.items():
        wanted(folder.source, path, tensors, *_VECTORS)
        names = {name: name for name in shared} if saved else {}
        sites[path] = SavedSite(kind, {"op": "linear"}, {**tensors, **(shared if saved else {})}, names)
    return SavedAdapter(folder.source, str(folder.config.get("base_model_name_or_path")), kind, sites)


def write(adapter: SavedAdapter) -> PeftFiles:
    """Configuration and tensors."""
    kind = adapter.kind
    assert isinstance(kind, VeRA)
    if any(site.kind != kind for site in adapter.sites.values()):
        raise InputError("PEFT has the same options of VeRA for all modules", where=adapter.source)
    widest = [max(site.shapes["features"][side] for site in adapter.sites.values()) for side in (0, 1)]
    if list(kind.size or widest) != widest:
        raise InputError(
            f"PEFT has shared matrices of the widest sides {widest}, not of size={list(kind.size or ())}",
            where=adapter.source,
            hint="insert it without size=",
        )
    config = {
        "r": kind.rank,
        "projection_prng_key": kind.seed,
        "save_projection": kind.save_projection,
        "d_initial": kind.initial,
        "bias": "none",
        "vera_dropout": 0.0,
        "target_modules": targets(adapter.sites),
    }
    tensors = {
        f"{PREFIX}{path}.{name}": site.tensors[name] for path, site in adapter.sites.items() for name in _VECTORS
    }
    if kind.save_projection:
        first = next(iter(adapter.sites.values()))
        tensors.update({f"base_model.{name}": first.tensors[name] for name in _SHARED})
    return PeftFiles(config, tensors)
