"""PA, the parallel adapter: a bottleneck beside a feed-forward block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from graphwright.passes.adapters.base import finite
from graphwright.passes.adapters.bottleneck import Bottleneck
from graphwright.passes.adapters.builder import Builder
from graphwright.passes.adapters.sites import Site


@dataclass(frozen=True)
class ParallelAdapter(Bottleneck):
    """``y = FFN(x) + s · up(act(down(x)))`` (He et al. 2022, "scaled PA", §4.6).

    x is what the block's first linears read, ``FFN(x)`` the value of its last linear, before dropout and residual sum.
    Parameters and options are those of :class:`Bottleneck`, and:

    Attributes:
        scale: s; the paper has 4.
    """

    kind: ClassVar[str] = "parallel"

    scale: float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        finite(self.kind, "scale", self.scale)

    def build(self, builder: Builder, site: Site, factors: Mapping[str, fx.Node]) -> None:
        """In parallel."""
        branch = builder.scaled(self.branch(builder, site.x, factors), self.scale)
        builder.adapt(site.node, builder.plus(site.node, branch))
