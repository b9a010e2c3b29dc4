"""Equivalent transformations: exact rewrites after which rounding hurts less."""

from graphwright.passes.quantization.equivalence.rotation import RotateHiddenStates
from graphwright.passes.quantization.equivalence.salient import ScaleSalientChannels
from graphwright.passes.quantization.equivalence.smoothing import SmoothActivations

__all__ = ["RotateHiddenStates", "ScaleSalientChannels", "SmoothActivations"]
