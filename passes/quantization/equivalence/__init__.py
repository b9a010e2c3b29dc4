"""Equivalent transformations: exact rewrites after which rounding hurts less."""

from graphwright.passes.quantization.equivalence.smoothing import SmoothActivations

__all__ = ["SmoothActivations"]
