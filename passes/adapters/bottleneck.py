"""Two linears with an activation between them, the narrow middle of several kinds of adapters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from graphwright.ir.errors import InputError
from graphwright.ir.pattern import Refusal
from graphwright.ir.program import Program
from graphwright.passes.adapters.base import AdapterKind, Draw, Factor, whole
from graphwright.passes.adapters.blocks import ATTENTION, FEED_FORWARD, block_sites
from graphwright.passes.adapters.builder import Builder
from graphwright.passes.adapters.sites import Site
from graphwright.passes.selection import Predicate

# activations by the names that options have -> operator and its arguments behind the input
ACTIVATIONS: dict[str, tuple[str, tuple[object, ...]]] = {
    "gelu": ("aten.gelu", ()),
    "leaky_relu": ("aten.leaky_relu", (0.01,)),
    "relu": ("aten.relu", ()),
    "sigmoid": ("aten.sigmoid", ()),
    "silu": ("aten.silu", ()),
    "tanh": ("aten.tanh", ()),
}


@dataclass(frozen=True)
class Bottleneck(AdapterKind):
    """``up(act(down(·)))`` at blocks of a transformer, with biases.

    Trains ``2 d b + b + d`` numbers a block of width d. ``down`` starts Kaiming-uniform, ``up`` and biases at 0.

    Attributes:
        bottleneck: b.
        activation: ``gelu``, ``leaky_relu``, ``relu``, ``sigmoid``, ``silu`` or ``tanh``.
        places: ``feed_forward``, ``attention`` or both.
    """

    unmergeable: ClassVar[str | None] = "its activation is not linear"

    bottleneck: int = 64
    activation: str = "relu"
    places: tuple[str, ...] = (FEED_FORWARD,)

    def __post_init__(self) -> None:
        whole(self.kind, "bottleneck", self.bottleneck)
        if self.activation not in ACTIVATIONS:
            raise InputError(
                f"must be one of {', '.join(ACTIVATIONS)}, not {self.activation!r}", where=f"{self.kind}: activation"
            )
        given = (self.places,) if isinstance(self.places, str) else self.places
        if (
            not isinstance(given, tuple | list)
            or not given
            or any(item not in (FEED_FORWARD, ATTENTION) for item in given)
        ):
            raise InputError(
                f"must be {FEED_FORWARD!r}, {ATTENTION!r} or both, not {self.places!r}", where=f"{self.kind}: places"
            )
        object.__setattr__(self, "places", tuple(given))

    def sites(self, program: Program, selected: Predicate, *, head: bool) -> Iterator[Site | Refusal]:
        """Blocks of the ``places``."""
        return block_sites(program, selected, self.places)

    def check(self, site: Site) -> str | None:
        """A bottleneck as wide as the block is an error."""
        if self.bottleneck >= site.features[0]:
            raise InputError(
                f"bottleneck {self.bottleneck} is not narrower than its block of {site.features[0]}",
                where=f"{self.kind} at {site.path}",
                hint=f"give bottleneck={site.features[0] - 1} or less",
            )
        return None

    def factors(self, site: Site, draw: Draw) -> dict[str, Factor]:
        """``down [b, d]``, ``down_bias [b]``, ``up [d, b]``, ``up_bias [d]``, with the kind's name before them."""
        width, narrow = site.features[0], self.bottleneck
        values = {
            "down": draw.kaiming_uniform(narrow, width).to(site.dtype),
            "down_bias": torch.zeros(narrow, dtype=site.dtype),
            "up": torch.zeros(width, narrow, dtype=site.dtype),
            "up_bias": torch.zeros(width, dtype=site.dtype),
        }
        return {f"{self.kind}_{key}": Factor(value) for key, value in values.items()}

    def branch(self, builder: Builder, x: fx.Node, factors: Mapping[str, fx.Node]) -> fx.Node:
        """``up(act(down(x)))``."""
        down, down_bias, up, up_bias = (factors[f"{self.kind}_{key}"] for key in ("down", "down_bias", "up", "up_bias"))
        operator, arguments = ACTIVATIONS[self.activation]
        hidden = builder.call(operator, builder.linear(x, down, down_bias), *arguments)
        return builder.linear(hidden, up, up_bias)
