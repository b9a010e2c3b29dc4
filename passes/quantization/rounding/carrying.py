"""Going over the columns of a weight, each time letting the columns still to come make up for what was changed.

What a column becomes is for a subclass to say: a code's value (GPTQ), or itself (SparseGPT). Some weights may become 0
in either: those that were 0 before, and those that cost least (Frantar and Alistarh 2023, "SparseGPT", algorithm 1).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from graphwright.ir.errors import InputError
from graphwright.ir.sparsity import UNSTRUCTURED, SparsityPattern
from graphwright.passes.quantization.rounding.factorization import inverse_of
from graphwright.passes.quantization.rounding.order import Order, Span

# Columns whose errors are passed on one by one; beyond them by products of matrices, first within the block.
_FEW = 32


@dataclass(frozen=True)
class Zeros:
    """Which weights become 0.

    Attributes:
        fixed: those that are 0 already.
        sparsity: fraction that goes, those that are 0 already among them; chosen anew in each block of columns, over
            all its rows, by ``w² / d²``: how much the outputs change when it goes and the others make up for it.
        pattern: that the zeros keep to. N of M are chosen when their first column is reached.
    """

    fixed: bool = False
    sparsity: float = 0.0
    pattern: SparsityPattern = UNSTRUCTURED

    @property
    def chooses(self) -> bool:
        """Whether weights go that are not 0 before."""
        return self.sparsity > 0 or self.pattern.among > 0

    @property
    def columns(self) -> int:
        """Columns that are chosen together; blocks of columns are multiples of it."""
        return self.pattern.among or self.pattern.columns

    def check(self, shape: torch.Size, block: int, group: int) -> None:
        """Check that columns can be gone over in blocks and groups of that many.

        Raises:
            InputError: the pattern does not divide them, or the weight.
        """
        if not self.chooses:
            return
        reason = self.pattern.objection(shape)
        if reason is None and block % self.columns:
            reason = f"blocks of {block} columns are no multiple of {self.columns}"
        if reason is None and group < shape[1] and group % self.columns:
            reason = f"groups of {group} columns are no multiple of {self.columns}"
        if reason is not None:
            raise InputError(
                f"cannot be pruned to {self.pattern}: {reason}",
                hint="use another pattern, or leave the linear out with ignore= or overrides",
            )


class Carrier(ABC):
    """Rows of a weight on their way through the algorithm, with the columns in the arrangement of the factor.

    Attributes:
        error: the squared error so far, in the metric of the damped moment.
        moved: that of the weight itself.
        kept: of the block's columns, ``[places, rows]``, which weights do not become 0; ``None`` for all.
    """

    def __init__(self, weight: torch.Tensor, factor: torch.Tensor, order: Order, zeros: Zeros) -> None:
        """Take the rows."""
        self.weight, self.factor, self.order, self.zeros_at = weight.detach(), factor, order, zeros
        # (W - Ŵ) L of the columns that are done, for those to come.
        self.pending = torch.zeros(weight.shape)
        self.error = self.moved = 0.0
        self.kept: torch.Tensor | None = None
        unit = zeros.pattern.among or 1
        self._few = max(_FEW // unit, 1) * unit

    def run(self) -> None:
        """Go over all columns."""
        for span in self.order.spans:
            self._settle(span)

    @abstractmethod
    def value(self, work: torch.Tensor, place: int, column: int, group: int) -> torch.Tensor:
        """What a column becomes, ``[rows]``.

        Args:
            work: the block's columns as they are now, ``[places, rows]``.
            place: the column's in the block.
            column: the column.
            group: of columns that share a grid, as the span's piece has it.
        """

    @abstractmethod
    def enter(self, span: Span, piece: tuple[int, int, int], work: torch.Tensor) -> None:
        """Before the columns of a piece of a block are gone over."""

    @abstractmethod
    def leave(self, columns: torch.Tensor, values: torch.Tensor) -> None:
        """After a block: its columns, and what they became, ``[places, rows]``."""

    def updated(self, start: int, stop: int, inverse: torch.Tensor | None = None) -> torch.Tensor:
        """Columns, as rows, as they make up best for the errors so far while they need not be changed."""
        exact = self.weight[:, self.order.columns[start:stop]].to(torch.float32)
        if stop == len(self.order.columns):
            return exact.t().contiguous()
        if inverse is None:
            inverse = inverse_of(self.factor[start:stop, start:stop])
        return exact.addmm_(self.pending[:, start:stop], inverse).t().contiguous()

    def _settle(self, span: Span) -> None:
        columns = self.order.columns[span.start : span.stop]
        inverse = inverse_of(self.factor[span.start : span.stop, span.start : span.stop])
        work = self.updated(span.start, span.stop, inverse)
        values, errors = torch.empty_like(work), torch.empty_like(work)
        gone = (self.weight[:, columns] == 0).t() if self.zeros_at.fixed else None
        self.kept = self._chosen(work, inverse, gone)
        stepwise = self.zeros_at.pattern.among if self.zeros_at.chooses else 0
        numbers = columns.tolist()
        for piece in span.pieces:
            start, stop, group = piece
            self.enter(span, piece, work)
            for end in range(stop - span.start, start - span.start, -self._few):
                begin = max(start - span.start, end - self._few)
                for place in range(end - 1, begin - 1, -1):
                    if stepwise and numbers[place] % stepwise == 0 and self.kept is not None:
                        few = slice(place - stepwise + 1, place + 1)
                        now = self._chosen(work[few], inverse[few, few], gone[few] if gone is not None else None)
                        if now is not None:
                            self.kept[few] = now
                    values[place] = self.value(work, place, numbers[place], group)
                    torch.sub(work[place], values[place], out=errors[place]).div_(inverse[place, place])
                    work[begin:place].addr_(inverse[place, begin:place], errors[place], alpha=-1)
                work[:begin].addmm_(inverse[begin:end, :begin].t(), errors[begin:end], alpha=-1)
        self.leave(columns, values)
        moved = self.weight[:, columns].to(torch.float32).t() - values
        self.error += float(errors.square_().sum())
        self.moved += float(moved.square().sum())
        if span.start:
            self.pending[:, : span.start].addmm_(moved.t(), self.factor[span.start : span.stop, : span.start])

    def _chosen(self, work: torch.Tensor, inverse: torch.Tensor, gone: torch.Tensor | None) -> torch.Tensor | None:
        """Which weights of some columns stay, ``[places, rows]``; ``None`` for all."""
        if not self.zeros_at.chooses:
            return ~gone if gone is not None else None
        scores = (work / inverse.diagonal().unsqueeze(1)).square_()
        if gone is not None:
            scores.masked_fill_(gone, -1.0)
        # Places fall as columns rise; patterns are over rows and columns.
        kept = self.zeros_at.pattern.mask(scores.flip(0).t().contiguous(), self.zeros_at.sparsity)
        kept = kept.t().flip(0).contiguous()
        return kept if gone is None else kept & ~gone
