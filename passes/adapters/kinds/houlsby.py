"""Houlsby's adapter: a bottleneck behind attention and feed-forward blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from graphwright.passes.adapters.blocks import ATTENTION, FEED_FORWARD
from graphwright.passes.adapters.bottleneck import Bottleneck
from graphwright.passes.adapters.builder import Builder
from graphwright.passes.adapters.sites import Site


@dataclass(frozen=True)
class HoulsbyAdapter(Bottleneck):
    """``y = h + up(act(down(h)))`` with ``h`` the value of a block's last linear (Houlsby et al. 2019, §2.1).

    It lies in sequence: behind the projection, before dropout, residual sum and the norm behind that. The paper draws
    both weights from a narrow normal distribution, which nearly leaves the model as it was; here ``up`` starts at 0,
    which leaves it exactly so. Parameters and options are those of :class:`Bottleneck`.
    """

    kind: ClassVar[str] = "houlsby"

    activation: str = "gelu"
    places: tuple[str, ...] = (ATTENTION, FEED_FORWARD)

    def build(self, builder: Builder, site: Site, factors: Mapping[str, fx.Node]) -> None:
        """In sequence."""
        builder.adapt(site.node, builder.plus(site.node, self.branch(builder, site.node, factors)))
