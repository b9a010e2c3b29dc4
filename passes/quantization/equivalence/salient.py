"""The pass that makes the weights of important features larger before they are rounded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import fx

from graphwright.ir.errors import InputError
from graphwright.ir.program import Program
from graphwright.passes.calibration import Observed, Stream
from graphwright.passes.quantization.equivalence.base import ScaleInputs, bounded, check_finite_rows
from graphwright.passes.quantization.equivalence.folding import Place
from graphwright.passes.quantization.formats import Format

# Weights looked at when ratios are compared: more output channels than this are thinned out evenly.
_CHANNELS = 4096


@dataclass(frozen=True, kw_only=True)
class ScaleSalientChannels(ScaleInputs):
    """Scale features so that those which carry most are rounded best (Lin et al. 2023, AWQ, eq. 4 and 5).

    ::

        %n = graphwright.rms_norm(%h, %g, 1e-05)             %n = graphwright.rms_norm(%h, %g / s, 1e-05)
        %y = aten.linear(%n, %w)                      ->     %y = aten.linear(%n, %w * s)

    ``s_j = mean |x_j|^r``, and with ``balance`` ``mean |x_j|^r / mean |w_j|^(1 - r)`` where ``|w_j|`` is relative to
    the largest weight of its group. The ratio ``r`` is the one of ``ratios`` in [0, 1) whose outputs, over the
    calibration data and all linears of the group, err least with weights rounded to the format. Rounding itself is
    another pass: give :class:`QuantizeLinears` the same format, and ``rounding="awq-clip"`` for AWQ's search of
    ranges.

    It does not fire where :class:`SmoothActivations` does not, nor where no ratio is better than no factors.

    Attributes:
        bits: of the format that weights will be rounded to.
        group_size: columns to a scale of that format; ``None`` for one scale per output channel.
        symmetric: whether its zero points are fixed.
        ratios: how many ratios are tried.
        balance: ``"auto"`` tries each ratio with and without the weights' sizes; ``True`` and ``False`` one of them.
        clip_search: whether the format looks for the range with the least squared error of the weights.
    """

    name: ClassVar[str] = "scale-salient-channels"

    bits: int = 4
    group_size: int | None = 128
    symmetric: bool = True
    ratios: int = 20
    balance: bool | str = "auto"
    clip_search: bool = False
    _form: Format = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.ratios, bool) or self.ratios < 1:
            raise InputError(f"must be at least 1, not {self.ratios!r}", where=f"{self.name}: ratios")
        if self.balance not in (True, False, "auto"):
            raise InputError(f"must be True, False or 'auto', not {self.balance!r}", where=f"{self.name}: balance")
        form = format_of(self.name, self.bits, self.group_size, self.symmetric, self.clip_search)
        object.__setattr__(self, "_form", form)

    def factors(
        self, program: Program, places: Sequence[Place], stream: Stream
    ) -> Iterator[tuple[Place, torch.Tensor]]:
        """The best ratio for every place."""
        for place in places:
            group = place.group
            stream.advance(group.first)
            inputs, mean = learnt(stream, group.x)
            check_finite_rows(program, group, mean)
            found = self._search(place, group.matrices(program), inputs, mean)
            if found is not None:
                yield place, found

    def _search(
        self, place: Place, matrices: Sequence[torch.Tensor], inputs: Observed, mean: torch.Tensor
    ) -> torch.Tensor | None:
        weights = [matrix[:: -(-len(matrix) // _CHANNELS)] for matrix in matrices]
        sizes = relative_sizes(weights, self._form)
        best, chosen = self._error(weights, torch.ones_like(mean), inputs), None
        for balanced in (False, True) if self.balance == "auto" else (bool(self.balance),):
            for step in range(self.ratios):
                ratio = step / self.ratios
                raw = salient_factors(mean, sizes if balanced else None, ratio)
                factors = place.tied(raw)
                error = self._error(weights, factors, inputs)
                if error < best:
                    best, chosen = error, factors
        return chosen

    def _error(self, weights: Sequence[torch.Tensor], factors: torch.Tensor, inputs: Observed) -> float:
        """Squared error of the outputs over the calibration data, with weights rounded as they are scaled."""
        total = 0.0
        for weight in weights:
            moved = rounded(weight * factors, self._form).div_(factors).sub_(weight)
            total += output_error(moved, inputs)
        return total


def learnt(stream: Stream, x: fx.Node) -> tuple[Observed, torch.Tensor]:
    """Statistics of a live value ``[..., features]``, and the mean size of each feature."""
    found, total = Observed.nothing(x.meta["val"].shape[-1]), torch.zeros(())
    for rows in stream.rows(x):
        found.add(rows)
        total = total + rows.abs().sum(0)
    return found, total / max(1, found.count)


def output_error(moved: torch.Tensor, inputs: Observed) -> float:
    """``Σ ‖moved x‖²`` over the calibration rows, or over a sample of them where that is less work."""
    if len(inputs.rows) < inputs.moment.shape[0]:
        return float((inputs.rows @ moved.T).square_().sum()) * inputs.count / max(1, len(inputs.rows))
    return float(((moved @ inputs.moment) * moved).sum())


def salient_factors(mean: torch.Tensor, sizes: torch.Tensor | None, ratio: float) -> torch.Tensor:
    """Factors ``[features]`` for a ratio, their extremes around 1.

    Args:
        mean: mean size of each feature of the inputs.
        sizes: relative sizes of the weights' columns, or ``None`` to leave them out of account.
        ratio: how much counts what the inputs say.
    """
    found = bounded(mean) ** ratio
    if sizes is not None:
        found = found / bounded(sizes) ** (1 - ratio)
    found = found.clamp_min(1e-4)
    return found / (found.max() * found.min()).sqrt()


def relative_sizes(weights: Sequence[torch.Tensor], form: Format) -> torch.Tensor:
    """Mean size of each column ``[features]`` relative to the largest weight of its group, over all rows."""
    total, rows = torch.zeros(weights[0].shape[1]), 0
    for weight in weights:
        size = form.columns_per_group(weight.shape[1])
        for piece, start in zip(weight.abs().split(size, 1), range(0, weight.shape[1], size), strict=True):
            top = piece.amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
            total[start : start + piece.shape[1]] += (piece / top).sum(0)
        rows += len(weight)
    return total / max(1, rows)


def format_of(name: str, bits: int, group_size: int | None, symmetric: bool, clip_search: bool) -> Format:
    """The integer format that a pass's options name.

    Raises:
        InputError: there is no such format; names the option.
    """
    if isinstance(bits, bool) or bits not in range(2, 9):
        raise InputError(f"must be in 2..8, not {bits!r}", where=f"{name}: bits")
    if group_size is not None and (isinstance(group_size, bool) or group_size < 2):
        raise InputError(f"must be at least 2, or None, not {group_size!r}", where=f"{name}: group_size")
    return Format(bits, group_size, symmetric, clip_search)


def groups_in(weight: torch.Tensor, form: Format) -> list[torch.Tensor]:
    """A weight ``[rows, columns]`` cut into ``[rows, groups, columns of a group]``; a shorter last group by itself."""
    rows, columns = weight.shape
    size = form.columns_per_group(columns)
    whole = columns // size * size
    found = [weight[:, :whole].reshape(rows, -1, size)] if whole else []
    return found + ([weight[:, whole:].unsqueeze(1)] if whole < columns else [])


def rounded(weight: torch.Tensor, form: Format) -> torch.Tensor:
    """A weight ``[rows, columns]`` float32 with every element at the nearest code of its group's grid."""
    parts = []
    for groups in groups_in(weight, form):
        scale, zero = form.fit(groups)
        parts.append(form.values(form.round(groups, scale, zero), scale, zero).flatten(1))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
