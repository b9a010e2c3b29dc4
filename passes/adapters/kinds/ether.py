"""ETHER and ETHER+: inputs, and outputs, of a layer reflected in blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from graphwright.ir.errors import InputError
from graphwright.passes.adapters.base import AdapterKind, Dense, Draw, Factor, whole
from graphwright.passes.adapters.builder import Builder
from graphwright.passes.adapters.sites import Site


@dataclass(frozen=True)
class ETHER(AdapterKind):
    """``y = (x H) Wᵀ + b``, ``H = diag(I - 2 ûᵢ ûᵢᵀ)`` with unit vectors ``ûᵢ = uᵢ / ‖uᵢ‖`` (Bini et al. 2024).

    Trains ``in`` numbers a linear, whatever the number of blocks. A reflection is never the identity: a new one, whose
    ``u`` is normal, changes the function, always by the same distance from the weight.

    Attributes:
        blocks: of the diagonal; divides the inputs.
    """

    kind: ClassVar[str] = "ether"
    identity: ClassVar[bool] = False

    blocks: int = 1

    def __post_init__(self) -> None:
        whole(self.kind, "blocks", self.blocks)

    def check(self, site: Site) -> str | None:
        """Blocks that do not divide the inputs are an error."""
        check_blocks(self.kind, site, "blocks", self.blocks, site.features[1])
        return None

    def factors(self, site: Site, draw: Draw) -> dict[str, Factor]:
        """``ether_u [blocks, in / blocks]``."""
        return {"ether_u": Factor(draw.normal(self.blocks, site.features[1] // self.blocks).to(site.dtype))}

    def build(self, builder: Builder, site: Site, factors: Mapping[str, fx.Node]) -> None:
        """``x - 2 (x · û) û``, block by block; no matrix is formed."""
        part = _projected(builder, site.x, factors["ether_u"], -2.0)
        builder.feed(site.node, site.input_name, builder.plus(site.x, part))

    def merged(self, site: Site, dense: Dense, factors: Mapping[str, torch.Tensor]) -> Dense:
        """``W H``, as ``H`` is symmetric."""
        unit = _unit(factors["ether_u"])
        return Dense(dense.weight - 2 * dense.weight @ _outer(unit), dense.bias)


@dataclass(frozen=True)
class ETHERPlus(AdapterKind):
    """``y = (x H⁺) Wᵀ H̃⁺ + b``, ``H⁺ = diag(I - ûᵢ ûᵢᵀ + v̂ᵢ v̂ᵢᵀ)`` (Bini et al. 2024, "ETHER+").

    Unlike a reflection it can come near the identity, and is so at the start: ``v`` starts as ``u``, which is normal.
    Trains ``2 (in + out)`` numbers a linear, ``2 in`` without the outputs' side.

    Attributes:
        blocks: of the diagonals; divides the inputs, and the outputs.
        both_sides: of the weight, as published; ``False`` for the inputs' side only.
    """

    kind: ClassVar[str] = "ether-plus"

    blocks: int = 1
    both_sides: bool = True

    def __post_init__(self) -> None:
        whole(self.kind, "blocks", self.blocks)

    def check(self, site: Site) -> str | None:
        """Blocks that do not divide a side are an error."""
        for size in reversed(site.features) if self.both_sides else site.features[1:]:
            check_blocks(self.kind, site, "blocks", self.blocks, size)
        return None

    def factors(self, site: Site, draw: Draw) -> dict[str, Factor]:
        """``ether_u``, ``ether_v`` ``[blocks, in / blocks]``; with ``_out`` those of the outputs."""
        found: dict[str, Factor] = {}
        for suffix, size in (("", site.features[1]), ("_out", site.features[0]))[: 2 if self.both_sides else 1]:
            start = draw.normal(self.blocks, size // self.blocks).to(site.dtype)
            found |= {f"ether_u{suffix}": Factor(start), f"ether_v{suffix}": Factor(start.clone())}
        return found

    def build(self, builder: Builder, site: Site, factors: Mapping[str, fx.Node]) -> None:
        """Sums of projections before and after the layer; the bias is not transformed."""
        away = _projected(builder, site.x, factors["ether_u"], -1.0)
        toward = _projected(builder, site.x, factors["ether_v"], 1.0)
        # The two cancel at the start, which they would not quite do one after the other.
        fed = builder.plus(site.x, builder.call("aten.add.Tensor", toward, away))
        if self.both_sides:
            bare = site.node if site.bias is None else builder.call("aten.sub.Tensor", site.node, site.bias)
            away = _projected(builder, bare, factors["ether_u_out"], -1.0)
            toward = _projected(builder, bare, factors["ether_v_out"], 1.0)
            builder.adapt(site.node, builder.plus(site.node, builder.call("aten.add.Tensor", toward, away)))
        builder.feed(site.node, site.input_name, fed)

    def merged(self, site: Site, dense: Dense, factors: Mapping[str, torch.Tensor]) -> Dense:
        """``H̃⁺ W H⁺``."""
        weight = dense.weight + dense.weight @ _difference(factors["ether_u"], factors["ether_v"])
        if self.both_sides:
            weight = weight + _difference(factors["ether_u_out"], factors["ether_v_out"]) @ weight
        return Dense(weight, dense.bias)


def check_blocks(kind: str, site: Site, option: str, given: int, size: int) -> None:
    """Check that an option divides a side of a weight.

    Raises:
        InputError: they do not; says what does.
    """
    if size % given:
        fitting = [each for each in range(1, size + 1) if size % each == 0]
        near = min(fitting, key=lambda each: abs(each - given))
        raise InputError(
            f"{option}={given} does not divide {size}, a side of its weight {list(site.features)}",
            where=f"{kind} at {site.path}",
            hint=f"the nearest that does is {option}={near}",
        )


def _projected(builder: Builder, x: fx.Node, vectors: fx.Node, factor: float) -> fx.Node:
    """``factor · (x · û) û`` in each block."""
    blocks, size = (int(each) for each in vectors.meta["val"].shape)
    norm = builder.call("aten.linalg_vector_norm", vectors, 2, [1], True)
    unit = builder.call("aten.div.Tensor", vectors, norm)
    parts = builder.call("aten.unflatten.int", x, -1, [blocks, size])
    along = builder.call("aten.sum.dim_IntList", builder.call("aten.mul.Tensor", parts, unit), [-1], True)
    return builder.call(
        "aten.flatten.using_ints", builder.call("aten.mul.Tensor", builder.scaled(along, factor), unit), -2, -1
    )


def _unit(vectors: torch.Tensor) -> torch.Tensor:
    norms: torch.Tensor = torch.linalg.vector_norm(vectors, 2, 1, keepdim=True)
    return vectors / norms


def _outer(unit: torch.Tensor) -> torch.Tensor:
    """``diag(ûᵢ ûᵢᵀ)``."""
    found: torch.Tensor = torch.block_diag(*(unit.unsqueeze(2) * unit.unsqueeze(1)))
    return found


def _difference(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """``diag(v̂ᵢ v̂ᵢᵀ - ûᵢ ûᵢᵀ)``."""
    return _outer(_unit(v)) - _outer(_unit(u))
