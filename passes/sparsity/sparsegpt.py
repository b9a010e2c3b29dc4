"""SparseGPT: weights go column by column, and the columns still to come make up for them.

Frantar, Alistarh: SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot (ICML 2023), algorithm 1, on
the factorisation and the walk over columns that GPTQ has here. Rounding at the same time is GPTQ with a sparsity:
``QuantizeLinears(rounding=Gptq(sparsity=0.5))``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from graphwright.ir.errors import InputError
from graphwright.ir.sparsity import SparsityPattern
from graphwright.passes.calibration import Observed
from graphwright.passes.quantization.loss import Loss
from graphwright.passes.quantization.rounding.carrying import Carrier, Zeros
from graphwright.passes.quantization.rounding.factorization import checked_moment, factor, factor_in_place
from graphwright.passes.quantization.rounding.gptq import output_size
from graphwright.passes.quantization.rounding.order import Order, Span, in_groups
from graphwright.passes.sparsity.methods import Norms, Pruned, PruningMethod

# Elements whose errors are carried along at once, as for GPTQ. Rows of larger weights are pruned in pieces, each of
# them to the same sparsity.
_CARRIED_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class SparseGpt(PruningMethod):
    """SparseGPT (Frantar and Alistarh 2023).

    Attributes:
        damping: added to the second moments' diagonal, as a fraction of its mean.
        block: columns whose mask is chosen together, over all rows, and whose errors are gathered before they reach
            the rest of the matrix; a multiple of M for N:M, and of a block's columns.
    """

    method: ClassVar[str] = "sparsegpt"
    needs: ClassVar[str] = "moments"
    damping: float = 0.01
    block: int = 128

    def __post_init__(self) -> None:
        if isinstance(self.damping, bool) or not 0.0 < self.damping < 10.0:
            raise InputError(f"must be above 0, not {self.damping!r}", where="sparsegpt: damping")
        if isinstance(self.block, bool) or not isinstance(self.block, int) or self.block < 1:
            raise InputError(f"must be an integer, 1 or more, not {self.block!r}", where="sparsegpt: block")

    def prune(
        self,
        weight: torch.Tensor,
        pattern: SparsityPattern,
        sparsity: float,
        inputs: Observed | Norms | None,
        *,
        fixed: bool,
    ) -> Pruned:
        """See :class:`SparseGpt`; uses the moment up."""
        assert isinstance(inputs, Observed)
        moment, columns = inputs.moment, weight.shape[1]
        diagonal, mean = checked_moment(moment, weight.shape)
        zeros = Zeros(fixed, sparsity, pattern)
        zeros.check(weight.shape, self.block, columns)
        with torch.no_grad():
            order = in_groups(diagonal.to(torch.float32), columns, self.block, act_order=False)
            size = output_size(moment, weight)
            found = factor_in_place(moment, mean, self.damping) if moment.dtype == torch.float32 else None
            if found is None:
                found = factor(moment, mean, self.damping, order.columns)
            result, error = torch.empty(weight.shape), 0.0
            step = max(1, _CARRIED_ELEMENTS // max(1, columns * pattern.rows)) * pattern.rows
            for start in range(0, len(weight), step):
                walk = _Pruner(weight[start : start + step], found, order, zeros, result[start : start + step])
                walk.run()
                error += walk.error - self.damping * walk.moved
                del walk  # before the next one's matrices
        return Pruned(result, Loss(max(error * mean, 0.0), size))


class _Pruner(Carrier):
    """Rows whose columns stay what they have become, but for those weights that go."""

    def __init__(
        self, weight: torch.Tensor, factor: torch.Tensor, order: Order, zeros: Zeros, result: torch.Tensor
    ) -> None:
        """Take the rows, and where they are to be written."""
        super().__init__(weight, factor, order, zeros)
        self.result = result

    def enter(self, span: Span, piece: tuple[int, int, int], work: torch.Tensor) -> None:
        """Nothing: there are no grids."""

    def value(self, work: torch.Tensor, place: int, column: int, group: int) -> torch.Tensor:
        """The column, 0 where its weights go."""
        return work[place] if self.kept is None else torch.where(self.kept[place], work[place], 0)

    def leave(self, columns: torch.Tensor, values: torch.Tensor) -> None:
        """Keep what the columns have become."""
        self.result[:, columns] = values.t()
