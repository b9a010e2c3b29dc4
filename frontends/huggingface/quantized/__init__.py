"""Quantised checkpoints of other tools, in both directions: GPTQ, AWQ and compressed-tensors folders."""

from graphwright.frontends.huggingface.quantized.saving import SavedModel, save_quantized

__all__ = ["SavedModel", "save_quantized"]
