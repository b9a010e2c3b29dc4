"""Outliers apart: the features and the weights that a few bits cannot hold, split off exactly before quantisation."""

from graphwright.passes.quantization.outliers.columns import SplitOutlierColumns
from graphwright.passes.quantization.outliers.weights import SplitOutlierWeights

__all__ = ["SplitOutlierColumns", "SplitOutlierWeights"]
