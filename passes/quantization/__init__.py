"""Quantisation: weights as small integers, with scales."""

from graphwright.passes.quantization.compensation import LoftQ, LowRank
from graphwright.passes.quantization.embeddings import QuantizeEmbeddings
from graphwright.passes.quantization.linears import QuantizeLinears
from graphwright.passes.quantization.rounding.gptq import Gptq
from graphwright.passes.quantization.rounding.hqq import Hqq
from graphwright.passes.quantization.rounding.nearest import Nearest

__all__ = ["Gptq", "Hqq", "LoftQ", "LowRank", "Nearest", "QuantizeEmbeddings", "QuantizeLinears"]
