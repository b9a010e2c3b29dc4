"""Passes that share layers, or do without some."""

from graphwright.passes.sharing.classification import ClassifyRepetitions
from graphwright.passes.sharing.layers import ShareLayers
from graphwright.passes.sharing.losses import repetition_loss, repetition_weights

__all__ = ["ClassifyRepetitions", "ShareLayers", "repetition_loss", "repetition_weights"]
