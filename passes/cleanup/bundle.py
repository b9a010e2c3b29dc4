"""The cleanup passes together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graphwright.passes.base import Pass
from graphwright.passes.cleanup.common_subexpressions import EliminateCommonSubexpressions
from graphwright.passes.cleanup.constant_folding import FoldConstants
from graphwright.passes.cleanup.dead_code import RemoveDeadCode
from graphwright.passes.cleanup.linears import CanonicalizeLinears
from graphwright.passes.cleanup.no_ops import RemoveNoOps
from graphwright.passes.pipeline import Pipeline


@dataclass(frozen=True, kw_only=True)
class Cleanup(Pipeline):
    """Every cleanup pass, again and again until none of them finds anything.

    The order saves rounds: dead code hides nothing afterwards, removed no-ops make expressions equal and constant;
    linears are spelled out before their constants could be folded.
    """

    name: ClassVar[str] = "cleanup"
    passes: tuple[Pass, ...] = (
        RemoveDeadCode(),
        RemoveNoOps(),
        CanonicalizeLinears(),
        FoldConstants(),
        EliminateCommonSubexpressions(),
    )
    fixed_point: bool = True
