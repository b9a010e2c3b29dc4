"""GPTQ: round the columns of a weight one by one, each time letting the columns still to come make up for the error.

Frantar, Ashkboos, Hoefler, Alistarh: GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers
(ICLR 2023), algorithm 1, with the scales of each group fitted when the group is reached.

The paper takes the Cholesky factor of the inverse of ``H = X Xᵀ``. Here ``H`` itself is factored, in the reverse of the
order in which columns are rounded: with ``H = L Lᵀ`` the inverses of the diagonal blocks of ``L`` are those of the
paper's factor, and the errors of all columns before reach a block as ``(W - Ŵ) L`` times that inverse (as in
QuIP's theorem 6, Chee et al. 2023). That is one factorisation instead of three steps; nothing large is inverted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from graphwright.ir.errors import InputError
from graphwright.passes.calibration import Observed
from graphwright.passes.quantization.finite import is_finite
from graphwright.passes.quantization.formats import Format
from graphwright.passes.quantization.rounding.base import Codes, InputRounding
from graphwright.passes.quantization.rounding.descent import dense, descend
from graphwright.passes.quantization.rounding.order import Order, Span, by_column, in_groups

# Columns whose errors are passed on one by one; beyond them by products of matrices, first within the block.
_FEW = 32
# Rows that the size of the outputs is estimated from.
_ROWS = 1024
# Elements worked on at once.
_SLICE_ELEMENTS = 1 << 22
# Elements whose errors are carried along at once: rows are rounded independently, and those of the largest weights in
# pieces. Each piece costs the overhead of going over all columns anew, which is little beside so many elements.
_CARRIED_ELEMENTS = 1 << 24
# The damping is the least that a pivot can be: where one is found below this part of it, float32 is not precise enough.
_TRUSTED = 0.5
# Epsilons of the largest eigenvalue that a pivot may be off by, and iterations that find that eigenvalue.
_ROUNDINGS, _ITERATIONS = 8, 12


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
    """

    method: ClassVar[str] = "gptq"
    damping: float = 0.01
    act_order: bool = False
    static_groups: bool = False
    sweeps: int = 0
    block: int = 128

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
    columns = weight.shape[1]
    if second_moment.shape != (columns, columns):
        raise InputError(f"the second moment is {list(second_moment.shape)}, the weight {list(weight.shape)}")
    if not is_finite(second_moment):
        raise InputError("the calibration inputs hold NaN or infinity", hint="check the calibration data")
    diagonal = second_moment.diagonal().to(torch.float64)
    mean = float(diagonal.mean())
    if mean <= 0.0:
        raise InputError("the calibration inputs of a linear are all zero", hint="check the calibration data")
    importance = (diagonal / mean).clamp_min(1e-8).to(torch.float32)
    with torch.no_grad():
        group_size = form.columns_per_group(columns)
        order = (
            by_column(importance, options.block)
            if options.static_groups
            else in_groups(importance, group_size, options.block, act_order=options.act_order)
        )
        size = _size(second_moment, weight)
        factor: torch.Tensor | None = None
        if spend and not options.sweeps and not options.act_order and second_moment.dtype == torch.float32:
            factor = _factor_in_place(second_moment, mean, options.damping)
        if factor is None:
            factor = _factor(second_moment, mean, options.damping, order.columns)
        found, error = _rounded(weight, form, importance, factor, order, options.damping)
        del factor
        error *= mean
        if options.sweeps:
            found = descend(weight, second_moment, found, form, sweeps=options.sweeps, damping=options.damping)
            error = _error(second_moment, weight, found, form)
        found.loss.error, found.loss.size = max(error, 0.0), size
        return found


def _size(second_moment: torch.Tensor, weight: torch.Tensor) -> float:
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


def _factor_in_place(moment: torch.Tensor, mean: float, damping: float) -> torch.Tensor | None:
    """As :func:`_factor` for the columns in falling order, where the moment lies; ``None``, and the moment as it was,
    where float32 may not be precise enough for it.

    What rounding does to a pivot is a few epsilons of the largest eigenvalue, and no pivot is less than the damping.
    """
    if _ROUNDINGS * torch.finfo(torch.float32).eps * _largest_eigenvalue(moment) / mean > (1 - _TRUSTED) * damping:
        return None
    size = len(moment)
    step = max(1, _SLICE_ELEMENTS // size)
    for start in range(0, size // 2, step):
        stop = min(start + step, size // 2)
        first, last = slice(start, stop), slice(size - stop, size - start)
        kept = moment[first].flip(0, 1)
        moment[first] = moment[last].flip(0, 1)
        moment[last] = kept
    if size % 2:
        moment[size // 2] = moment[size // 2].flip(0)
    moment /= mean
    moment.diagonal().add_(damping)
    turned, failed = moment.t(), torch.empty((), dtype=torch.int32)
    torch.linalg.cholesky_ex(turned, out=(turned, failed))
    if int(failed):
        raise _singular()
    return turned


def _largest_eigenvalue(moment: torch.Tensor) -> float:
    """By power iteration; at most too small by a little, as the start has a part of every eigenvector."""
    vector = torch.randn(len(moment), generator=torch.Generator().manual_seed(0))
    for _ in range(_ITERATIONS):
        vector = moment @ (vector / torch.linalg.vector_norm(vector))
    return float(torch.linalg.vector_norm(vector))


def _singular() -> InputError:
    return InputError(
        "the calibration inputs do not determine the rounding (their second moment is singular)",
        hint="give more calibration data, or raise the damping",
    )


def _factor(second_moment: torch.Tensor, mean: float, damping: float, columns: torch.Tensor) -> torch.Tensor:
    """Lower Cholesky factor, float32, of the damped second moment, with its rows and columns arranged anew.

    Computed in float32, in place, and again in float64 only if a pivot shows that this was not precise enough: none can
    be less than the damping.
    """
    size = len(second_moment)
    for dtype in (torch.float32, torch.float64):
        damped = torch.empty(size, size, dtype=dtype)
        step = max(1, _SLICE_ELEMENTS // size)
        for start in range(0, size, step):
            damped[start : start + step] = second_moment[columns[start : start + step]][:, columns]
        damped /= mean
        damped.diagonal().add_(damping)
        # A symmetric matrix is its own transpose, which has the layout that LAPACK works on in place.
        turned, failed = damped.t(), torch.empty((), dtype=torch.int32)
        torch.linalg.cholesky_ex(turned, out=(turned, failed))
        if not int(failed) and float(turned.diagonal().min()) ** 2 >= _TRUSTED * damping:
            return turned.to(torch.float32)
        del damped, turned
    raise _singular()


def _rounded(
    weight: torch.Tensor, form: Format, importance: torch.Tensor, factor: torch.Tensor, order: Order, damping: float
) -> tuple[Codes, float]:
    """Codes, and the squared error in the metric of the moment, of mean diagonal 1."""
    rows, count = weight.shape
    groups = -(-count // form.columns_per_group(count))
    found = Codes(torch.empty(rows, count, dtype=torch.uint8), torch.empty(rows, groups), torch.empty(rows, groups))
    step = max(1, _CARRIED_ELEMENTS // max(1, count * form.block_rows)) * form.block_rows
    error = 0.0
    for start in range(0, rows, step):
        piece = slice(start, start + step)
        own = Codes(found.codes[piece], found.scales[piece], found.zeros[piece])
        rounder = _Rounder(weight[piece], form, importance, factor, order, own)
        rounder.run()
        error += rounder.error - damping * rounder.moved
        del rounder  # before the next one's matrices
    return found, error


class _Rounder:
    """Rows of a weight on their way through the algorithm, with the columns in the arrangement of the factor.

    Attributes:
        error: the squared error so far, in the metric of the damped moment.
        moved: that of the weight itself.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        form: Format,
        importance: torch.Tensor,
        factor: torch.Tensor,
        order: Order,
        found: Codes,
    ) -> None:
        """Take the rows, and where their codes, scales and zero points are to be written."""
        rows, count = weight.shape
        self.weight, self.form, self.importance = weight.detach(), form, importance
        self.factor, self.order = factor, order
        self.group_size = form.columns_per_group(count)
        self.codes, self.scales, self.zeros = found.codes, found.scales, found.zeros
        # (W - Ŵ) L of the columns that are done, for those to come.
        self.pending = torch.zeros(rows, count)
        self.error = self.moved = 0.0

    def run(self) -> None:
        """Round all columns."""
        if self.order.places is None:
            for group in range(self.scales.shape[1]):
                own = slice(group * self.group_size, (group + 1) * self.group_size)
                self._fit(group, self.weight[:, own].to(torch.float32), self.importance[own])
        for span in self.order.spans:
            self._round(span)

    def _fit(self, group: int, weights: torch.Tensor, importance: torch.Tensor) -> None:
        self.scales[:, group], self.zeros[:, group] = self.form.fit(weights, importance)

    def _updated(self, start: int, stop: int, inverse: torch.Tensor | None = None) -> torch.Tensor:
        """Columns, as rows, as they make up best for the errors so far while they need not be rounded."""
        exact = self.weight[:, self.order.columns[start:stop]].to(torch.float32)
        if stop == len(self.order.columns):
            return exact.t().contiguous()
        if inverse is None:
            inverse = _inverse(self.factor[start:stop, start:stop])
        return exact.addmm_(self.pending[:, start:stop], inverse).t().contiguous()

    def _round(self, span: Span) -> None:
        columns = self.order.columns[span.start : span.stop]
        inverse = _inverse(self.factor[span.start : span.stop, span.start : span.stop])
        work = self._updated(span.start, span.stop, inverse)
        codes, values, errors = (
            torch.empty_like(work, dtype=torch.uint8),
            torch.empty_like(work),
            torch.empty_like(work),
        )
        for start, stop, group in span.pieces:
            if self.order.places is not None and stop == self.order.places[group][1]:
                first = self.order.places[group][0]
                # A group that reaches beyond the block is fitted as a whole.
                now = work[start - span.start : stop - span.start] if first == start else self._updated(first, stop)
                self._fit(group, now.t(), self.importance[self.order.columns[first:stop]])
            for end in range(stop - span.start, start - span.start, -_FEW):
                begin = max(start - span.start, end - _FEW)
                for place in range(end - 1, begin - 1, -1):
                    own = group if self.order.places is not None else int(columns[place]) // self.group_size
                    scale, zero = self.scales[:, own], self.zeros[:, own]
                    code = self.form.round(work[place].unsqueeze(-1), scale, zero)
                    codes[place] = code.squeeze(-1)
                    values[place] = self.form.values(code, scale, zero).squeeze(-1)
                    torch.sub(work[place], values[place], out=errors[place]).div_(inverse[place, place])
                    work[begin:place].addr_(inverse[place, begin:place], errors[place], alpha=-1)
                work[:begin].addmm_(inverse[begin:end, :begin].t(), errors[begin:end], alpha=-1)
        self.codes[:, columns] = codes.t()
        moved = self.weight[:, columns].to(torch.float32).t() - values
        self.error += float(errors.square_().sum())
        self.moved += float(moved.square().sum())
        if span.start:
            self.pending[:, : span.start].addmm_(moved.t(), self.factor[span.start : span.stop, : span.start])


def _inverse(block: torch.Tensor) -> torch.Tensor:
    """Of a lower triangular block."""
    found: torch.Tensor = torch.linalg.solve_triangular(block, torch.eye(len(block)), upper=False)
    return found
