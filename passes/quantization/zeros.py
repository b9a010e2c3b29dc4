"""Zeros of pruned weights, once the weights are packed: they must still be zeros, and are known by the codes' name."""

from __future__ import annotations

from torch import fx

from graphwright.ir.arguments import argument
from graphwright.ir.errors import ContractViolation
from graphwright.ir.program import Program
from graphwright.ir.provenance import add_tags
from graphwright.ir.pruned import MASKED, RECORD, follow, is_masked, note_pruned
from graphwright.passes.quantization.targets import LinearTarget
from graphwright.passes.quantization.weights import ChannelWeight, PackedWeight


def keep_mask(
    program: Program, target: LinearTarget, packed: PackedWeight | ChannelWeight, new: fx.Node, pattern: str | None
) -> None:
    """Check that what was 0 in a pruned weight is 0 in the packed one, and let the records follow it.

    Args:
        program: which still has the weight.
        target: the linear.
        packed: its new weight.
        new: the linear on that.
        pattern: of the zeros that rounding has chosen; ``None`` where it chooses none.

    Raises:
        ContractViolation: a weight that was pruned is not 0 any more.
    """
    codes = str(argument(new, "qweight").target)
    if codes in program.records.get(RECORD, {}):
        return  # of another linear with the same weight
    if not is_masked(target.node) and pattern is None:
        return
    nonzero = packed.dense() != 0
    name = str(target.weight.target)
    if is_masked(target.node):
        weight = program.tensor(target.weight).detach()
        filled = int((nonzero & ((weight.t() if target.transposed else weight) == 0)).sum())
        if filled:
            raise ContractViolation(
                f"{filled} weights that were pruned are not 0 after rounding",
                pass_name="quantize-linears",
                where=f"weight {name!r}",
                hint="use a format that has a code for exactly 0",
            )
    follow(program, [name], codes, nonzero)
    if pattern is not None:
        note_pruned(program, codes, nonzero, pattern)
        add_tags(new, (MASKED,))
