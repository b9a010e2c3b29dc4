"""Pruned weights as they stand in a program: values, tags and records."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from graphwright.ir.program import Program
from graphwright.ir.provenance import add_tags
from graphwright.ir.pruned import MASKED, note_pruned
from graphwright.ir.rewriter import Rewriter
from graphwright.ir.sparsity import SparsityPattern
from graphwright.passes.quantization.targets import LinearTarget


def write_pruned(
    rewriter: Rewriter, targets: Sequence[LinearTarget], stored: torch.Tensor, pattern: SparsityPattern
) -> float:
    """Give a weight pruned values, tag the linears that read it, and write it down.

    Args:
        rewriter: of the program.
        targets: the linears.
        stored: the weight as they store it, 0 where it was pruned.
        pattern: of the zeros.

    Returns:
        its sparsity.
    """
    program: Program = rewriter.program
    weight = targets[0].weight
    if not torch.equal(program.tensor(weight).detach(), stored):
        rewriter.rebind(weight, stored)
    for target in targets:
        add_tags(target.node, (MASKED,))
    mask = stored != 0
    note_pruned(program, str(weight.target), mask, str(pattern))
    return 1 - int(mask.sum()) / max(1, mask.numel())
