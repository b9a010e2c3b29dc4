"""``peft_type`` LOKR and LOHA, which have their options and names after LyCORIS."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from graphwright.ir.errors import InputError
from graphwright.passes.adapters.base import AdapterKind
from graphwright.passes.adapters.files import SavedAdapter, SavedSite
from graphwright.passes.adapters.kinds.loha import LoHa
from graphwright.passes.adapters.kinds.lokr import LoKr
from graphwright.passes.adapters.kinds.lora import scaling
from graphwright.passes.adapters.peft.folder import PREFIX, PeftFiles, PeftFolder, alpha_of, targets, usual

_LEAVES = {
    "LOHA": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
    "LOKR": ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"),
}
_KNOWN = (
    "alpha",
    "alpha_pattern",
    "decompose_both",
    "decompose_factor",
    "r",
    "rank_pattern",
    "use_effective_conv2d",  # means something for the tensors that are refused below only
)
_CORES = (".lokr_t2", ".hada_t1", ".hada_t2")


def read(folder: PeftFolder) -> SavedAdapter:
    """The adapter of a folder."""
    folder.check_options(_KNOWN)
    core = next((name for name in folder.tensors if name.endswith(_CORES)), None)
    if core is not None:
        raise InputError(
            f"PEFT's option use_effective_conv2d=True is not supported: {core} is a core of a convolution's kernel",
            where=folder.source,
            hint="train with use_effective_conv2d=False, or merge it with PEFT",
        )
    _check_kernels(folder.source, folder.tensors)
    name = str(folder.config["peft_type"])
    sites: dict[str, SavedSite] = {}
    for path, tensors in folder.by_module({leaf: leaf for leaf in _LEAVES[name]}).items():
        rank = int(folder.matched("rank_pattern", path, folder.config.get("r", 8)))
        alpha = float(folder.matched("alpha_pattern", path, folder.config.get("alpha", 8)))
        kind: AdapterKind = LoHa(rank, alpha, ("linear", "conv"))
        if name == "LOKR":
            factor = int(folder.config.get("decompose_factor", -1))
            kind = LoKr(rank, alpha, factor, bool(folder.config.get("decompose_both")), ("linear", "conv"))
        # Whether it is a linear's or a convolution's does not show in the tensors.
        sites[path] = SavedSite(kind, {}, tensors, {})
    first = next(iter(sites.values())).kind
    return SavedAdapter(folder.source, str(folder.config.get("base_model_name_or_path")), first, sites)


def write(adapter: SavedAdapter) -> PeftFiles:
    """Configuration and tensors."""
    kinds = {path: site.kind for path, site in adapter.sites.items()}
    rank, ranks = usual(kinds, lambda kind: kind.rank)
    alpha, alphas = usual(kinds, lambda kind: alpha_of(kind.alpha, scaling(kind.rank, 1.0)))
    config = {
        "r": rank,
        "rank_pattern": ranks,
        "alpha": alpha,
        "alpha_pattern": alphas,
        "use_effective_conv2d": False,
        "target_modules": targets(adapter.sites),
    }
    if isinstance(adapter.kind, LoKr):
        for option, field in (("decompose_both", "decompose_both"), ("decompose_factor", "factor")):
            values = {getattr(kind, field) for kind in kinds.values()}
            if len(values) > 1:
                raise InputError(f"PEFT has one {option} for all modules, not {sorted(values)}", where=adapter.source)
            config[option] = values.pop()
    tensors = {
        f"{PREFIX}{path}.{key}": tensor for path, site in adapter.sites.items() for key, tensor in site.tensors.items()
    }
    _check_kernels(adapter.source, tensors)
    return PeftFiles(config, tensors)


def _check_kernels(source: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse a whole second factor over one dimension, whose product PEFT takes along other axes than LyCORIS.

    Raises:
        InputError: there is one.
    """
    for name, tensor in tensors.items():
        if name.endswith(".lokr_w2") and tensor.dim() == 3:
            raise InputError(
                f"{name} is a Conv1d's whole factor, whose Kronecker product PEFT takes along the kernel's axis",
                where=source,
                hint="use a smaller rank there, which decomposes the factor, or merge it with PEFT",
            )
