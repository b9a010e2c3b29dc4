"""Linears of a program on packed weights, and on Kronecker products."""

from __future__ import annotations

import torch

from graphwright.backends.triton.kernels.epilogue import Epilogue
from graphwright.backends.triton.kernels.kron_linear import kron_linear
from graphwright.backends.triton.kernels.linear_nbits import FEW_ROWS, fused_linear_nbits, linear_nbits
from graphwright.backends.triton.kernels.nbits_weight import NbitsWeight, refusal, repack
from graphwright.backends.triton.nodes.base import LinearKernel, NodeKernel, Site


class NbitsLinear(LinearKernel):
    """``linear_nbits`` with what follows it."""

    def __init__(self, weight: NbitsWeight) -> None:
        super().__init__()
        self.weight = weight
        self.label = f"linear_nbits W{weight.bits} (split-K up to {FEW_ROWS} rows, else tiles)"

    def with_gradients(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """By the kernel, with the gradient of the input by another."""
        return linear_nbits(x, self.weight, bias)

    def fused(self, x: torch.Tensor, epilogue: Epilogue) -> torch.Tensor:
        """One kernel."""
        return fused_linear_nbits(x, self.weight, epilogue)


class KronLinear(NodeKernel):
    """``kron_linear``."""

    inputs = ("x", "a", "b", "scale")
    label = "kron_linear"

    def forward(self, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
        """The product, with gradients."""
        return kron_linear(x, a, b, scale)


def lower_nbits(site: Site) -> NodeKernel | str:
    """``graphwright.linear_nbits``."""
    given = site.arguments
    if not all(site.is_stored(name) for name in ("qweight", "scales", "zero_points")):
        return "its weight is computed"
    if (reason := site.unlike("x")) is not None:
        return reason
    zeros = site.maybe_stored("zero_points")
    if (reason := refusal(given["bits"], given["group_size"], zeros)) is not None:
        return reason
    columns = int(site.value("x").shape[-1])
    weight = repack(site.stored("qweight"), site.stored("scales"), zeros, given["bits"], given["group_size"], columns)
    return NbitsLinear(weight)


def lower_codebook(site: Site) -> NodeKernel | str:
    """``graphwright.linear_codebook``."""
    if site.arguments["format"] == "fp8_e4m3":
        return "FP8 weights have kernels with FP8 activations: QuantizeLinears(dtype='fp8_e4m3', activations='fp8')"
    return f"codes of {site.arguments['format']} have no kernel; integers of 2 to 8 bits have"


def lower_kron(site: Site) -> NodeKernel | str:
    """``graphwright.kron_linear``."""
    return site.unlike("x", "a", "b") or KronLinear()
