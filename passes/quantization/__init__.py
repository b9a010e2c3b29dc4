"""Quantisation: weights as small integers, with scales."""

from graphwright.passes.quantization.embeddings import QuantizeEmbeddings
from graphwright.passes.quantization.linears import QuantizeLinears

__all__ = ["QuantizeEmbeddings", "QuantizeLinears"]
