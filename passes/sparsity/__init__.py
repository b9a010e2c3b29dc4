"""Sparsity: weights that are exactly 0, stay so, and are stored so that they cost nothing."""

from graphwright.passes.sparsity.allocation import LossDriven
from graphwright.passes.sparsity.description import LinearSparsity, SparsityDescription, describe_sparsity
from graphwright.passes.sparsity.given import PruneByMasks
from graphwright.passes.sparsity.gradual import PruneGradually
from graphwright.passes.sparsity.holding import HoldMasks, ReleaseMasks
from graphwright.passes.sparsity.linears import PruneLinears
from graphwright.passes.sparsity.methods import Magnitude, PruningMethod, Wanda
from graphwright.passes.sparsity.schedules import CubicSchedule, LadderSchedule, SparsitySchedule
from graphwright.passes.sparsity.sparsegpt import SparseGpt

__all__ = [
    "CubicSchedule",
    "HoldMasks",
    "LadderSchedule",
    "LinearSparsity",
    "LossDriven",
    "Magnitude",
    "PruneByMasks",
    "PruneGradually",
    "PruneLinears",
    "PruningMethod",
    "ReleaseMasks",
    "SparseGpt",
    "SparsityDescription",
    "SparsitySchedule",
    "Wanda",
    "describe_sparsity",
]
