"""Quantisation: weights as small integers, with scales."""

from graphwright.passes.quantization.embeddings import QuantizeEmbeddings
from graphwright.passes.quantization.linears import QuantizeLinears
from graphwright.passes.quantization.rounding.autoround import AutoRound
from graphwright.passes.quantization.rounding.gptq import Gptq
from graphwright.passes.quantization.rounding.nearest import Nearest
from graphwright.passes.quantization.training import ConvertFakeQuantize, InsertFakeQuantize

__all__ = [
    "AutoRound",
    "ConvertFakeQuantize",
    "Gptq",
    "InsertFakeQuantize",
    "Nearest",
    "QuantizeEmbeddings",
    "QuantizeLinears",
]
