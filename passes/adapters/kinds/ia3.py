"""IA3: learned factors of a layer's outputs or inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from graphwright.ir.errors import InputError
from graphwright.ir.pattern import Refusal
from graphwright.ir.program import Program
from graphwright.passes.adapters.base import AdapterKind, Dense, Draw, Factor
from graphwright.passes.adapters.builder import Builder
from graphwright.passes.adapters.layers import check_ops, layer_sites
from graphwright.passes.adapters.sites import Site
from graphwright.passes.selection import Predicate


@dataclass(frozen=True)
class IA3(AdapterKind):
    """``y = l ⊙ (x Wᵀ + b)`` or ``y = (l ⊙ x) Wᵀ + b`` (Liu et al. 2022, "(IA)³", section 3.3).

    Trains ``out`` or ``in`` numbers a linear, or channels of a convolution; they start at 1. The paper rescales keys,
    values and what the feed-forward's second linear reads::

        InsertAdapters(IA3(), where=["*.k_proj", "*.v_proj", "*.down_proj"],
                       overrides={"*.down_proj": {"side": "input"}})

    Attributes:
        side: ``output`` or ``input``.
        ops: of the layers it goes to: ``linear``, ``conv``.
    """

    kind: ClassVar[str] = "ia3"

    side: str = "output"
    ops: tuple[str, ...] = ("linear",)

    def __post_init__(self) -> None:
        if self.side not in ("output", "input"):
            raise InputError(f"must be 'output' or 'input', not {self.side!r}", where=f"{self.kind}: side")
        object.__setattr__(self, "ops", check_ops(self.kind, self.ops, ("linear", "conv")))

    def sites(self, program: Program, selected: Predicate, *, head: bool) -> Iterator[Site | Refusal]:
        """Layers of the ``ops``."""
        return layer_sites(program, selected, self.ops, kind=self.kind, head=head)

    def factors(self, site: Site, draw: Draw) -> dict[str, Factor]:
        """``ia3_l [out]`` or ``[in]``."""
        size = site.features[0 if self.side == "output" else 1]
        return {"ia3_l": Factor(torch.ones(size, dtype=site.dtype))}

    def build(self, builder: Builder, site: Site, factors: Mapping[str, fx.Node]) -> None:
        """One product."""
        scales = factors["ia3_l"]
        if site.op == "conv":
            scales = builder.call("aten.view", scales, [-1, *(1,) * len(site.kernel)])
        if self.side == "output":
            builder.adapt(site.node, builder.call("aten.mul.Tensor", site.node, scales))
        else:
            builder.feed(site.node, site.input_name, builder.call("aten.mul.Tensor", site.x, scales))

    def merged(self, site: Site, dense: Dense, factors: Mapping[str, torch.Tensor]) -> Dense:
        """``diag(l) W`` and ``l ⊙ b``, or ``W diag(l)``."""
        scales, ones = factors["ia3_l"], (1,) * len(site.kernel)
        if self.side == "output":
            bias = None if dense.bias is None else dense.bias * scales
            return Dense(dense.weight * scales.view(-1, 1, *ones), bias)
        # Each group of a convolution has channels of its own.
        columns = scales.view(site.groups, 1, -1).expand(-1, site.features[0] // site.groups, -1).flatten(0, 1)
        return Dense(dense.weight * columns.view(*columns.shape, *ones), dense.bias)
