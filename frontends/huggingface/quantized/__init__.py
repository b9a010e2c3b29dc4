"""Quantised checkpoints of other tools, in both directions: GPTQ, AWQ and compressed-tensors folders."""
