"""LoRA-FA: LoRA whose first matrix stays as it was drawn."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from graphwright.passes.adapters.base import Draw, Factor
from graphwright.passes.adapters.kinds.lora import LoRA
from graphwright.passes.adapters.sites import Site


@dataclass(frozen=True)
class LoRAFA(LoRA):
    """``y = x Wᵀ + s · (x Aᵀ) Bᵀ`` with ``A [r, in]`` frozen and ``B [out, r]`` trained (Zhang et al. 2023).

    Trains ``r out`` numbers a linear. No activation as wide as the input is kept for the backward pass, only
    ``x Aᵀ``. ``A`` starts Kaiming-uniform, ``B`` at 0.
    """

    kind: ClassVar[str] = "lora-fa"

    def check(self, site: Site) -> str | None:
        """An embedding has nothing to train if its ``A``, which starts at 0, stays."""
        if site.op == "embedding":
            return "the A of an embedding starts at 0 and would stay there"
        return super().check(site)

    def factors(self, site: Site, draw: Draw) -> dict[str, Factor]:
        """LoRA's; ``lora_A`` is a constant."""
        found = super().factors(site, draw)
        return {**found, "lora_A": dataclasses.replace(found["lora_A"], trained=False)}
