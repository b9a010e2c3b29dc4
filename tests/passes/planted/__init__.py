"""Wrong rewrites, and right ones that look like them."""

from tests.passes.planted import (
    encoder_attention,
    grouped_query_decoder,
    inputs_and_outputs,
    linears_and_norms,
    quantized_weights,
    right_rewrites,
    tied_decoder,
)
from tests.passes.planted.catalogue import RIGHT, WRONG, Entry, SentenceEmbedder

__all__ = [
    "RIGHT",
    "WRONG",
    "Entry",
    "SentenceEmbedder",
    "encoder_attention",
    "grouped_query_decoder",
    "inputs_and_outputs",
    "linears_and_norms",
    "quantized_weights",
    "right_rewrites",
    "tied_decoder",
]
