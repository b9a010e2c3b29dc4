"""The pass that trains factors for features so that blocks keep their outputs with rounded weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

from graphwright.ir.errors import InputError
from graphwright.ir.program import Program
from graphwright.passes.calibration import Block, Stream, blocks_of
from graphwright.passes.calibration.stream import run_nodes
from graphwright.passes.quantization.equivalence.absorbing import Absorption
from graphwright.passes.quantization.equivalence.base import ScaleInputs
from graphwright.passes.quantization.equivalence.features import representatives
from graphwright.passes.quantization.equivalence.folding import Place
from graphwright.passes.quantization.equivalence.salient import format_of, groups_in
from graphwright.passes.quantization.formats import Format
from graphwright.passes.quantization.targets import LinearTarget


@dataclass(frozen=True, kw_only=True)
class TrainEquivalentScales(ScaleInputs):
    """Train the factors of features by gradients through rounded weights (Cheng et al. 2023, TEQ, eq. 4 to 6).

    ::

        %n = graphwright.rms_norm(%h, %g, 1e-05)             %n = graphwright.rms_norm(%h, %g / s, 1e-05)
        %y = aten.linear(%n, %w)                      ->     %y = aten.linear(%n, %w * s)

    Block by block (a layer of the model), all factors of a block together: Adam on ``log s``, from ``s = 1``, minimises
    the squared error of what the block gives with weights ``round(w * s) / s``, relative to its size; rounding itself
    passes gradients on as if it were not there. Factors that end up worse than none are
    dropped.

    It does not fire where :class:`SmoothActivations` does not.

    Attributes:
        bits: of the format that weights will be rounded to.
        group_size: columns to a scale of that format; ``None`` for one scale per output channel.
        symmetric: whether its zero points are fixed.
        clip_search: whether it looks for the range with the least squared error.
        steps: updates for each block, one batch each.
        learning_rate: of the first update; it falls linearly to 0.
    """

    name: ClassVar[str] = "train-equivalent-scales"

    bits: int = 4
    group_size: int | None = 128
    symmetric: bool = True
    clip_search: bool = False
    steps: int = 100
    learning_rate: float = 0.01
    _form: Format = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(
            self, "_form", format_of(self.name, self.bits, self.group_size, self.symmetric, self.clip_search)
        )
        if isinstance(self.steps, bool) or self.steps < 1:
            raise InputError(f"must be at least 1, not {self.steps!r}", where=f"{self.name}: steps")
        if isinstance(self.learning_rate, bool) or not 0.0 < self.learning_rate < 1.0:
            raise InputError(f"must be in 0..1, not {self.learning_rate!r}", where=f"{self.name}: learning_rate")

    def factors(
        self, program: Program, places: Sequence[Place], stream: Stream
    ) -> Iterator[tuple[Place, torch.Tensor]]:
        """Trained factors, block by block."""
        for block in blocks_of(stream.program):
            inside = {node.name for node in block.nodes}
            here = [place for place in places if place.group.first.name in inside]
            if here:
                stream.advance(block.nodes[0])
                yield from _Training(self, stream, block, here).run()


class _Training:
    """One block's factors."""

    def __init__(self, options: TrainEquivalentScales, stream: Stream, block: Block, places: Sequence[Place]) -> None:
        self.options, self.stream, self.block, self.places = options, stream, block, places
        self.outputs = _outputs(block)
        read = {operand for node in block.nodes for operand in node.all_input_nodes}
        self.inputs = [node for node in stream.live() if node in read]
        self.logarithms = [torch.zeros(_width(place), requires_grad=True) for place in places]
        self.tied = [
            representatives(place.absorbed.features, place.absorbed.ties)
            if isinstance(place.absorbed, Absorption)
            else torch.arange(_width(place))
            for place in places
        ]

    def run(self) -> Iterator[tuple[Place, torch.Tensor]]:
        """Train; nothing where the block errs less without factors."""
        with torch.no_grad():
            before = self._total()
        adam = torch.optim.Adam(self.logarithms, lr=self.options.learning_rate)
        steps, generator = self.options.steps, torch.Generator().manual_seed(0)
        order: list[int] = []
        for step in range(steps):
            order = order or torch.randperm(self.stream.batches, generator=generator).tolist()
            for group in adam.param_groups:
                group["lr"] = self.options.learning_rate * (1 - step / steps)
            adam.zero_grad()
            with torch.enable_grad():
                self._loss(order.pop()).backward()
            adam.step()
        with torch.no_grad():
            if not self._total() < before:
                return
        for place, logarithm, tied in zip(self.places, self.logarithms, self.tied, strict=True):
            yield place, logarithm.detach()[tied].exp()

    def _total(self) -> float:
        return sum(float(self._loss(batch)) for batch in range(self.stream.batches))

    def _loss(self, batch: int) -> torch.Tensor:
        """Squared error of a batch relative to the outputs' squared size, summed over the outputs."""
        values = {node: self.stream.value(node, batch) for node in self.inputs}
        with torch.no_grad():
            exact = run_nodes(self.stream.program, self.block.nodes, values)
        found = run_nodes(self.stream.program, self.block.nodes, values, self._weights())
        total = torch.zeros(())
        for node in self.outputs:
            wanted = self.stream.without_padding(exact[node], batch).to(torch.float32)
            given = self.stream.without_padding(found[node], batch).to(torch.float32)
            size = wanted.square().mean().clamp_min(torch.finfo(torch.float32).tiny)
            total = total + (given - wanted).square().mean() / size
        if not bool(torch.isfinite(total)):
            raise InputError(
                "the block's outputs are NaN or infinite on the calibration data",
                where=self.block.path or "the nodes outside the layers",
                hint="check the calibration data and the weights",
            )
        return total

    def _weights(self) -> Mapping[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for place, logarithm, tied in zip(self.places, self.logarithms, self.tied, strict=True):
            factors = logarithm[tied].exp()
            for linear in place.group.linears:
                stored = self.stream.program.tensor(str(linear.weight.target)).detach()
                weight = (stored.t() if linear.transposed else stored).to(torch.float32)
                dense = straight_through(weight * factors, self.options._form) / factors
                found[str(linear.weight.target)] = self._as_stored(dense, linear, stored.dtype)
        return found

    @staticmethod
    def _as_stored(dense: torch.Tensor, linear: LinearTarget, dtype: torch.dtype) -> torch.Tensor:
        return (dense.t() if linear.transposed else dense).to(dtype)


def straight_through(weight: torch.Tensor, form: Format) -> torch.Tensor:
    """A weight ``[rows, columns]`` float32 rounded to a format, with gradients.

    With ``v`` the value a code stands for and ``c`` the scale, ``dv = v / c dc``, and ``+ dw - w / c dc`` for weights
    that are not clipped. The scale is taken for a fixed multiple of its group's extent ``max w - min w``.
    """
    parts = [_straight_through(groups, form).flatten(1) for groups in groups_in(weight, form)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _straight_through(groups: torch.Tensor, form: Format) -> torch.Tensor:
    held = groups.detach()
    scale, zero = form.fit(held)
    value = form.values(form.round(held, scale, zero), scale, zero)
    extent = groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)
    fixed = extent.detach()
    grown = extent / fixed.clamp_min(torch.finfo(torch.float32).tiny) - (fixed > 0).to(held.dtype)
    within = ((value - held).abs() <= 0.501 * scale.abs().unsqueeze(-1)).to(held.dtype)
    return value + value * grown + within * ((groups - held) - held * grown)


def _outputs(block: Block) -> list[fx.Node]:
    inside = set(block.nodes)
    return [
        node
        for node in block.nodes
        if not inside.issuperset(node.users)
        and isinstance(node.meta.get("val"), torch.Tensor)
        and node.meta["val"].is_floating_point()
    ]


def _width(place: Place) -> int:
    width: Any = place.group.x.meta["val"].shape[-1]
    return int(width)
