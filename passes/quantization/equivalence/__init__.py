"""Equivalent transformations: exact rewrites after which rounding hurts less."""

from graphwright.passes.quantization.equivalence.rotation import RotateHiddenStates
from graphwright.passes.quantization.equivalence.salient import ScaleSalientChannels
from graphwright.passes.quantization.equivalence.smoothing import SmoothActivations
from graphwright.passes.quantization.equivalence.trained import TrainEquivalentScales

__all__ = ["RotateHiddenStates", "ScaleSalientChannels", "SmoothActivations", "TrainEquivalentScales"]
