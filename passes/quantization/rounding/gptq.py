"""GPTQ: round the columns of a weight one by one, each time letting the columns still to come make up for the error.

Frantar, Ashkboos, Hoefler, Alistarh: GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers
(ICLR 2023), algorithm 1, with the scales of each group fitted when the group is reached.

The paper takes the Cholesky factor of the inverse of ``H = X Xᵀ``. Here ``H`` itself is factored, in the reverse of the
order in which columns are rounded: with ``H = L Lᵀ`` the inverses of the diagonal blocks of ``L`` are those of the
paper's factor, and the errors of all columns before reach a block as ``(W - Ŵ) L`` times that inverse (as in
QuIP's theorem 6, Chee et al. 2023). That is one factorisation instead of three steps; nothing large is inverted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from graphwright.ir.errors import InputError
from graphwright.ir.sparsity import SparsityPattern
from graphwright.passes.calibration import Observed
from graphwright.passes.quantization.formats import Format
from graphwright.passes.quantization.rounding.base import Codes, InputRounding
from graphwright.passes.quantization.rounding.carrying import Carrier, Zeros
from graphwright.passes.quantization.rounding.descent import dense, descend
from graphwright.passes.quantization.rounding.factorization import checked_moment, factor, factor_in_place
from graphwright.passes.quantization.rounding.order import Order, Span, by_column, in_groups

# Rows that the size of the outputs is estimated from.
_ROWS = 1024
# Elements worked on at once.
_SLICE_ELEMENTS = 1 << 22
# Elements whose errors are carried along at once: rows are rounded independently, and those of the largest weights in
# pieces. Each piece costs the overhead of going over all columns anew, which is little beside so many elements.
_CARRIED_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class Gptq(InputRounding):
    """GPTQ (Frantar et al. 2023).

    Attributes:
        damping: added to the second moments' diagonal, as a fraction of its mean.
        act_order: round the columns with the largest inputs first, while the others can still make up for them. Groups
            stay as they are stored: they are rounded one after another, the most important first, and the columns
            within each by importance, so nothing is permuted when the model runs.
        static_groups: with ``act_order``, fit all grids to the original weight beforehand; columns are then rounded in
            order of importance wherever their group is.
        sweeps: after the last column, go over all of them again so many times, with the scales fitted anew to the codes
            (see :mod:`graphwright.passes.quantization.rounding.descent`). Each costs about as much as GPTQ itself.
        block: columns whose errors are gathered before they reach the rest of the matrix.
        sparsity: fraction of weights that become 0 on the way, chosen and made up for together with the rounding
            (Frantar and Alistarh 2023, "SparseGPT", section 3.5). Not with ``act_order``.
        pattern: that those zeros keep to, such as ``"2:4"``, which says the sparsity too.
    """

    method: ClassVar[str] = "gptq"
    damping: float = 0.01
    act_order: bool = False
    static_groups: bool = False
    sweeps: int = 0
    block: int = 128
    sparsity: float = 0.0
    pattern: str = "unstructured"

    def __post_init__(self) -> None:
        if not 0.0 < self.damping < 10.0:
            raise InputError(f"must be above 0, not {self.damping!r}", where="gptq: damping")
        for option in ("sweeps", "block"):
            least, value = (0, 1)[option == "block"], getattr(self, option)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(f"must be an integer, {least} or more, not {value!r}", where=f"gptq: {option}")
        if self.static_groups and not self.act_order:
            raise InputError(
                "goes with act_order=True: in the usual order grids are fitted when their group is reached",
                where="gptq: static_groups",
            )
        pattern = SparsityPattern.of(self.pattern, where="gptq: pattern")
        wanted = self.sparsity or pattern.implied
        if isinstance(self.sparsity, bool) or not 0.0 <= self.sparsity < 1.0:
            raise InputError(f"must be at least 0 and below 1, not {self.sparsity!r}", where="gptq: sparsity")
        if pattern.implied not in (None, wanted):
            raise InputError(f"{pattern} has {pattern.implied}, not {self.sparsity!r}", where="gptq: sparsity")
        if wanted and self.act_order:
            raise InputError("goes with columns as they are stored", where="gptq: sparsity", hint="act_order=False")

    def pattern_of_zeros(self) -> str | None:
        """The pattern, where there is a sparsity."""
        pattern = SparsityPattern.of(self.pattern, where="gptq: pattern")
        return str(pattern) if self.sparsity or pattern.implied else None

    def zeros(self, form: Format) -> Zeros:
        """Which weights become 0, or stay it."""
        pattern = SparsityPattern.of(self.pattern, where="gptq: pattern")
        return Zeros(form.keep_zeros, self.sparsity, pattern)

    def codes(self, weight: torch.Tensor, form: Format, inputs: Observed) -> Codes:
        """See :func:`gptq`; uses the moment up."""
        return gptq(weight, inputs.moment, form, options=self, spend=True)


def gptq(
    weight: torch.Tensor,
    second_moment: torch.Tensor,
    form: Format,
    *,
    options: Gptq | None = None,
    spend: bool = False,
) -> Codes:
    """Quantise one weight so that ``X Wᵀ`` changes least.

    Beyond the weight, the moment and the codes this takes a matrix of the weight's size, in float32 and at most 64 MiB,
    and a second one of the moment's unless that may be spent.

    Args:
        weight: ``[out, in]``, floating.
        second_moment: ``[in, in]``, ``Σ x xᵀ`` over calibration tokens; any positive factor does not matter.
        form: the format; its grids are fitted when their group is reached.
        options: the method's; its defaults for ``None``.
        spend: the moment may be overwritten. It is where columns are rounded as they are stored, without sweeps.

    Raises:
        InputError: the second moment is not finite, of another size, or not positive even when damped.
    """
    options = options or Gptq()
    diagonal, mean = checked_moment(second_moment, weight.shape)
    zeros = options.zeros(form)
    zeros.check(weight.shape, options.block, form.columns_per_group(weight.shape[1]))
    importance = (diagonal / mean).clamp_min(1e-8).to(torch.float32)
    with torch.no_grad():
        group_size = form.columns_per_group(weight.shape[1])
        order = (
            by_column(importance, options.block)
            if options.static_groups
            else in_groups(importance, group_size, options.block, act_order=options.act_order)
        )
        size = output_size(second_moment, weight)
        found_factor: torch.Tensor | None = None
        if spend and not options.sweeps and not options.act_order and second_moment.dtype == torch.float32:
            found_factor = factor_in_place(second_moment, mean, options.damping)
        if found_factor is None:
            found_factor = factor(second_moment, mean, options.damping, order.columns)
        found, error = _rounded(weight, form, importance, found_factor, order, options.damping, zeros)
        del found_factor
        error *= mean
        if options.sweeps:
            kept = dense(found, form) != 0 if zeros.chooses else weight != 0 if zeros.fixed else None
            found = descend(
                weight, second_moment, found, form, sweeps=options.sweeps, damping=options.damping, kept=kept
            )
            error = _error(second_moment, weight, found, form)
        found.loss.error, found.loss.size = max(error, 0.0), size
        return found


def output_size(second_moment: torch.Tensor, weight: torch.Tensor) -> float:
    """``|X Wᵀ|²``; of weights with many rows estimated from some of them, as it costs more than all the rest."""
    every, moment = -(-len(weight) // _ROWS), second_moment.to(torch.float32)
    step = max(1, _SLICE_ELEMENTS // max(1, weight.shape[1] * every)) * every
    found = whole = some = 0.0
    for start in range(0, len(weight), step):  # a multiple of every, so that each slice begins with one of the rows
        part = weight[start : start + step].detach().to(torch.float32)
        whole += float(torch.linalg.vector_norm(part)) ** 2
        part = part[::every]
        some += float(torch.linalg.vector_norm(part)) ** 2
        found += float(((part @ moment) * part).sum())
    return max(found, 0.0) * whole / some if some > 0 else 0.0


def _error(second_moment: torch.Tensor, weight: torch.Tensor, found: Codes, form: Format) -> float:
    """``|X (W - Ŵ)ᵀ|²``, a slice of rows at a time."""
    moment, total = second_moment.to(torch.float32), 0.0
    step = max(1, _SLICE_ELEMENTS // max(1, weight.shape[1]))
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        part = weight[rows].detach().to(torch.float32) - dense(found, form, rows)
        total += float(((part @ moment) * part).sum())
    return total


def _rounded(
    weight: torch.Tensor,
    form: Format,
    importance: torch.Tensor,
    factor: torch.Tensor,
    order: Order,
    damping: float,
    zeros: Zeros,
) -> tuple[Codes, float]:
    """Codes, and the squared error in the metric of the moment, of mean diagonal 1."""
    rows, count = weight.shape
    groups = -(-count // form.columns_per_group(count))
    found = Codes(torch.empty(rows, count, dtype=torch.uint8), torch.empty(rows, groups), torch.empty(rows, groups))
    unit = math.lcm(form.block_rows, zeros.pattern.rows)
    step = max(1, _CARRIED_ELEMENTS // max(1, count * unit)) * unit
    error = 0.0
    for start in range(0, rows, step):
        piece = slice(start, start + step)
        own = Codes(found.codes[piece], found.scales[piece], found.zeros[piece])
        rounder = _Rounder(weight[piece], form, importance, factor, order, own, zeros)
        rounder.run()
        error += rounder.error - damping * rounder.moved
        del rounder  # before the next one's matrices
    return found, error


class _Rounder(Carrier):
    """Rows whose columns become values of codes."""

    def __init__(
        self,
        weight: torch.Tensor,
        form: Format,
        importance: torch.Tensor,
        factor: torch.Tensor,
        order: Order,
        found: Codes,
        zeros: Zeros,
    ) -> None:
        """Take the rows, and where their codes, scales and zero points are to be written."""
        super().__init__(weight, factor, order, zeros)
        self.form, self.importance = form, importance
        self.group_size = form.columns_per_group(weight.shape[1])
        self.codes, self.scales, self.zeros = found.codes, found.scales, found.zeros
        # Of the columns of a block, each one stretch of memory.
        widest = max(span.stop - span.start for span in order.spans)
        self._block = torch.empty(widest, len(weight), dtype=torch.uint8)

    def run(self) -> None:
        """Round all columns."""
        if self.order.places is None:
            for group in range(self.scales.shape[1]):
                own = slice(group * self.group_size, (group + 1) * self.group_size)
                self._fit(group, self.weight[:, own].to(torch.float32), self.importance[own])
        super().run()

    def _fit(self, group: int, weights: torch.Tensor, importance: torch.Tensor) -> None:
        self.scales[:, group], self.zeros[:, group] = self.form.fit(weights, importance)

    def enter(self, span: Span, piece: tuple[int, int, int], work: torch.Tensor) -> None:
        """Fit the grid of a group that is reached."""
        start, stop, group = piece
        if self.order.places is None or stop != self.order.places[group][1]:
            return
        first = self.order.places[group][0]
        columns = self.order.columns[first:stop]
        # A group that reaches beyond the block is fitted as a whole.
        if first == start:
            now = work[start - span.start : stop - span.start]
            if self.kept is not None:
                now = torch.where(self.kept[start - span.start : stop - span.start], now, 0)
        else:
            now = self.updated(first, stop)
            if self.zeros_at.fixed:
                now = torch.where((self.weight[:, columns] == 0).t(), 0, now)
        self._fit(group, now.t(), self.importance[columns])

    def value(self, work: torch.Tensor, place: int, column: int, group: int) -> torch.Tensor:
        """The value of the nearest code, which is kept; 0 where the weight goes."""
        own = group if self.order.places is not None else column // self.group_size
        scale, zero = self.scales[:, own], self.zeros[:, own]
        code = self.form.round(work[place].unsqueeze(-1), scale, zero)
        if self.kept is not None:
            code = torch.where(self.kept[place].unsqueeze(-1), code, zero.unsqueeze(-1))
        self._block[place] = code.squeeze(-1)
        return self.form.values(code, scale, zero).squeeze(-1)

    def leave(self, columns: torch.Tensor, values: torch.Tensor) -> None:
        """Keep the codes."""
        self.codes[:, columns] = self._block[: len(columns)].t()
