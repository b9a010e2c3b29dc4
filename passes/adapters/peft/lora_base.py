"""What PEFT's LoRA changes in the base itself: trained biases, and starts that take the adapter out of the weights.

Our base stays as it is, so each becomes part of the adapter, once the weights are known that it goes to.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from graphwright.ir.errors import InputError
from graphwright.passes.adapters.files import SavedSite
from graphwright.passes.adapters.kinds.lora import LoRA
from graphwright.passes.adapters.peft.folder import PREFIX, PeftFolder
from graphwright.passes.adapters.sites import Site

_BIAS = ".base_layer.bias"
# Starts that take a product of rank r out of the weight, which its values determine.
STARTS = ("olora", "pissa")


def without_biases(folder: PeftFolder) -> tuple[PeftFolder, dict[str, torch.Tensor]]:
    """A folder without the base's biases, and these by module path.

    Raises:
        InputError: there are some of layers that have no adapter.
    """
    biases = {name: tensor for name, tensor in folder.tensors.items() if _is_bias(name)}
    others = [name for name in biases if not name.endswith(_BIAS)]
    if others:
        raise folder.refused(
            "bias",
            f"{others[0]} belongs to a layer without adapter: train with bias='lora_only', or merge it with PEFT",
        )
    rest = {name: tensor for name, tensor in folder.tensors.items() if name not in biases}
    found = {name.removeprefix(PREFIX).removesuffix(_BIAS): tensor for name, tensor in biases.items()}
    return replace(folder, tensors=rest), found


@dataclass(frozen=True)
class Beside:
    """Makes a site's tensors those that go beside the base as it is.

    Attributes:
        source: the folder, for messages.
        start: one of :data:`STARTS`, or empty.
        biases: what the base's biases are after training, by module path.
    """

    source: str
    start: str
    biases: Mapping[str, torch.Tensor]

    def __call__(self, saved: SavedSite, site: Site) -> SavedSite:
        """The site, with the base in view.

        Raises:
            InputError: its layer has no bias of that shape, or no weight that the start is defined for.
        """
        kind = saved.kind
        assert isinstance(kind, LoRA)
        if site.path in self.biases:
            saved = self._biased(saved, kind, site)
        return self._started(saved, kind, site) if self.start else saved

    def _biased(self, saved: SavedSite, kind: LoRA, site: Site) -> SavedSite:
        """``b' = b + s · β``, β of the adapter."""
        trained, own = self.biases[site.path], None
        if site.bias is not None and site.program is not None:
            own = site.program.tensor(site.bias).detach()
        if own is None or own.shape != trained.shape or kind.scale == 0:
            shown = "none" if own is None else list(own.shape)
            raise InputError(
                f"has a trained bias {list(trained.shape)} for {site.path}, the program's is {shown}",
                where=self.source,
                hint="insert it into the model that it was trained in",
            )
        more = (trained.double() - own.double()) / kind.scale
        present = saved.tensors.get("lora_bias")
        more = more if present is None else more + present.double()
        tensors = {**saved.tensors, "lora_bias": more.to(trained.dtype)}
        return replace(saved, kind=replace(kind, bias=True), tensors=tensors)

    def _started(self, saved: SavedSite, kind: LoRA, site: Site) -> SavedSite:
        """``W - s B₀ A₀ + s B A = W + s [B, -B₀] [A; A₀]``, of twice the rank."""
        if site.op != "linear" or site.packed or kind.scale <= 0:
            raise InputError(
                f"init_lora_weights={self.start!r} took the start of {site.path} out of its weight, which must be that "
                "of a linear, in floating point, with a positive scale",
                where=self.source,
                hint="insert it before quantising, or save it with path_initial_model_for_weight_conversion=",
            )
        weight, rank, scale = site.dense().double(), kind.rank, kind.scale
        if self.start == "pissa":
            left, sizes, right = torch.linalg.svd(weight, full_matrices=False)
            roots = (sizes[:rank] / scale).sqrt()
            b, a = left[:, :rank] * roots, roots.unsqueeze(1) * right[:rank]
        else:
            q, r = torch.linalg.qr(weight)
            b, a = q[:, :rank], r[:rank]
        ours = saved.tensors
        tensors = {
            **ours,
            "lora_A": torch.cat([ours["lora_A"].double(), a]).to(ours["lora_A"].dtype),
            "lora_B": torch.cat([ours["lora_B"].double(), -b], 1).to(ours["lora_B"].dtype),
        }
        alpha = scale * (2 * rank) ** (0.5 if kind.rank_stabilized else 1)
        has_bias = "lora_bias" in tensors
        return replace(saved, kind=replace(kind, rank=2 * rank, alpha=alpha, bias=has_bias), tensors=tensors)


def _is_bias(name: str) -> bool:
    return name.startswith(PREFIX) and name.endswith(".bias") and ".lora_" not in name
