"""Passes that share layers, repeat them, or do without some."""

from graphwright.passes.sharing.classification import ClassifyRepetitions
from graphwright.passes.sharing.deepening import DeepenLayers
from graphwright.passes.sharing.dropping import DropBlocks, TruncateDepth
from graphwright.passes.sharing.heads import ShareHeads
from graphwright.passes.sharing.layers import ShareLayers
from graphwright.passes.sharing.losses import repetition_loss, repetition_weights

__all__ = [
    "ClassifyRepetitions",
    "DeepenLayers",
    "DropBlocks",
    "ShareHeads",
    "ShareLayers",
    "TruncateDepth",
    "repetition_loss",
    "repetition_weights",
]
