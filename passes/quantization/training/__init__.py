"""Quantisation-aware training: linears that round as they train, and how they are stored once they have."""

from graphwright.passes.quantization.training.conversion import ConvertFakeQuantize
from graphwright.passes.quantization.training.insertion import InsertFakeQuantize

__all__ = ["ConvertFakeQuantize", "InsertFakeQuantize"]
