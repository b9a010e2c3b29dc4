"""Quantisation: weights as small integers, with scales."""

from graphwright.passes.quantization.allocation import Allocation, allocate
from graphwright.passes.quantization.embeddings import QuantizeEmbeddings
from graphwright.passes.quantization.linears import QuantizeLinears
from graphwright.passes.quantization.rounding.gptq import Gptq
from graphwright.passes.quantization.rounding.nearest import Nearest
from graphwright.passes.quantization.sensitivity import (
    LinearSensitivity,
    Sensitivities,
    sensitivities,
    skip_by_kurtosis,
)

__all__ = [
    "Allocation",
    "Gptq",
    "LinearSensitivity",
    "Nearest",
    "QuantizeEmbeddings",
    "QuantizeLinears",
    "Sensitivities",
    "allocate",
    "sensitivities",
    "skip_by_kurtosis",
]
