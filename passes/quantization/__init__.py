"""Quantisation: weights as small integers, with scales."""

from graphwright.passes.quantization.attention import QuantizeAttention
from graphwright.passes.quantization.embeddings import QuantizeEmbeddings
from graphwright.passes.quantization.linears import QuantizeLinears
from graphwright.passes.quantization.outliers import SplitOutlierColumns, SplitOutlierWeights
from graphwright.passes.quantization.rounding.gptq import Gptq
from graphwright.passes.quantization.rounding.nearest import Nearest

__all__ = [
    "Gptq",
    "Nearest",
    "QuantizeAttention",
    "QuantizeEmbeddings",
    "QuantizeLinears",
    "SplitOutlierColumns",
    "SplitOutlierWeights",
]
