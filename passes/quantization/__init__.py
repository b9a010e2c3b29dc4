"""Quantisation: weights as small integers, with scales."""

from graphwright.passes.quantization.embeddings import QuantizeEmbeddings
from graphwright.passes.quantization.equivalence import (
    RotateHiddenStates,
    ScaleSalientChannels,
    SmoothActivations,
    TrainEquivalentScales,
)
from graphwright.passes.quantization.linears import QuantizeLinears
from graphwright.passes.quantization.rounding.clipped import ClippedNearest
from graphwright.passes.quantization.rounding.gptq import Gptq
from graphwright.passes.quantization.rounding.nearest import Nearest

__all__ = [
    "ClippedNearest",
    "Gptq",
    "Nearest",
    "QuantizeEmbeddings",
    "QuantizeLinears",
    "RotateHiddenStates",
    "ScaleSalientChannels",
    "SmoothActivations",
    "TrainEquivalentScales",
]
