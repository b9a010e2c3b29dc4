"""Passes that make a program smaller and plainer without changing what it computes."""

from graphwright.passes.cleanup.bundle import Cleanup
from graphwright.passes.cleanup.common_subexpressions import EliminateCommonSubexpressions
from graphwright.passes.cleanup.constant_folding import FoldConstants
from graphwright.passes.cleanup.dead_code import RemoveDeadCode
from graphwright.passes.cleanup.linears import CanonicalizeLinears
from graphwright.passes.cleanup.no_ops import RemoveNoOps
from graphwright.passes.cleanup.transposition import TransposeLinears

__all__ = [
    "CanonicalizeLinears",
    "Cleanup",
    "EliminateCommonSubexpressions",
    "FoldConstants",
    "RemoveDeadCode",
    "RemoveNoOps",
    "TransposeLinears",
]
