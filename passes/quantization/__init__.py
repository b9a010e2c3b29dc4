"""Quantisation: weights as small integers, with scales."""

from graphwright.passes.quantization.allocation import Allocation, allocate
from graphwright.passes.quantization.attention import QuantizeAttention
from graphwright.passes.quantization.compensation import LoftQ, LowRank
from graphwright.passes.quantization.embeddings import QuantizeEmbeddings
from graphwright.passes.quantization.equivalence import (
    RotateHiddenStates,
    ScaleSalientChannels,
    SmoothActivations,
    TrainEquivalentScales,
)
from graphwright.passes.quantization.linears import QuantizeLinears
from graphwright.passes.quantization.outliers import SplitOutlierColumns, SplitOutlierWeights
from graphwright.passes.quantization.rounding.autoround import AutoRound
from graphwright.passes.quantization.rounding.clipped import ClippedNearest
from graphwright.passes.quantization.rounding.gptq import Gptq
from graphwright.passes.quantization.rounding.hqq import Hqq
from graphwright.passes.quantization.rounding.nearest import Nearest
from graphwright.passes.quantization.sensitivity import (
    LinearSensitivity,
    Sensitivities,
    sensitivities,
    skip_by_kurtosis,
)
from graphwright.passes.quantization.training import ConvertFakeQuantize, InsertFakeQuantize

__all__ = [
    "Allocation",
    "AutoRound",
    "ClippedNearest",
    "ConvertFakeQuantize",
    "Gptq",
    "Hqq",
    "InsertFakeQuantize",
    "LinearSensitivity",
    "LoftQ",
    "LowRank",
    "Nearest",
    "QuantizeAttention",
    "QuantizeEmbeddings",
    "QuantizeLinears",
    "RotateHiddenStates",
    "ScaleSalientChannels",
    "Sensitivities",
    "SmoothActivations",
    "SplitOutlierColumns",
    "SplitOutlierWeights",
    "TrainEquivalentScales",
    "allocate",
    "sensitivities",
    "skip_by_kurtosis",
]
