"""``peft_type`` OFT, exact or in terms of a series, with blocks of their own and no constraint."""

from __future__ import annotations

from graphwright.ir.errors import InputError
from graphwright.passes.adapters.files import SavedAdapter, SavedSite
from graphwright.passes.adapters.kinds.oft import OFT
from graphwright.passes.adapters.peft.folder import PREFIX, PeftFiles, PeftFolder, targets

_KNOWN = (
    "eps",  # of coft, which is refused
    "fan_in_fan_out",
    "num_cayley_neumann_terms",
    "oft_block_size",
    "r",
    "use_cayley_neumann",
)


def read(folder: PeftFolder) -> SavedAdapter:
    """The adapter of a folder."""
    folder.check_options(_KNOWN)
    terms = int(folder.config.get("num_cayley_neumann_terms", 5)) if folder.config.get("use_cayley_neumann") else 0
    if terms == 1:
        raise folder.refused("num_cayley_neumann_terms", "one term is the identity, whatever was trained")
    sites: dict[str, SavedSite] = {}
    for path, tensors in folder.by_module({"oft_R.weight": "oft_R"}).items():
        blocks, count = (int(size) for size in tensors["oft_R"].shape)
        block = int((1 + (1 + 8 * count) ** 0.5) / 2)  # count = block (block - 1) / 2
        sites[path] = SavedSite(OFT(block, terms), {"op": "linear"}, {"oft_R": tensors["oft_R"]}, {})
        if blocks < 1 or block * (block - 1) // 2 != count:
            raise folder.unknown(f"{PREFIX}{path}.oft_R.weight")
    first = next(iter(sites.values())).kind
    return SavedAdapter(folder.source, str(folder.config.get("base_model_name_or_path")), first, sites)


def write(adapter: SavedAdapter) -> PeftFiles:
    """Configuration and tensors."""
    assert isinstance(adapter.kind, OFT)
    if any(site.kind != adapter.kind for site in adapter.sites.values()):
        raise InputError("PEFT has one oft_block_size for all modules", where=adapter.source)
    config = {
        "r": 0,
        "oft_block_size": adapter.kind.block,
        "use_cayley_neumann": adapter.kind.terms > 0,
        **({"num_cayley_neumann_terms": adapter.kind.terms} if adapter.kind.terms else {}),
        "coft": False,
        "block_share": False,
        "bias": "none",
        "module_dropout": 0.0,
        "target_modules": targets(adapter.sites),
    }
    tensors = {f"{PREFIX}{path}.oft_R.weight": site.tensors["oft_R"] for path, site in adapter.sites.items()}
    return PeftFiles(config, tensors)
