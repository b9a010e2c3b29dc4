"""Linears on a Kronecker product, which is never formed."""

from __future__ import annotations

import torch

from graphwright.backends.cpu.kernels.base import Kernel, Lowering, Site
from graphwright.backends.cpu.kernels.linear import Linear, unsuitable
from graphwright.ir.ops.kronecker import b_first


class KronLinear(Linear):
    """``scale · x (A ⊗ B)ᵀ`` as two small products, in float32.

    Args:
        a: ``[a1, a2]``.
        b: ``[b1, b2]``.
        isa: instruction set of the kernel.
        scale: factor of the result.
    """

    def __init__(self, a: torch.Tensor, b: torch.Tensor, isa: str, scale: float = 1.0) -> None:
        from graphwright.backends.cpu import _native  # not at the top: it may be absent

        first = b_first(tuple(a.shape), tuple(b.shape))
        rows, columns = (each.detach().to(torch.float32).contiguous().numpy() for each in (a, b.t()))
        kernel = _native.KronLinear(isa, rows, columns, scale, first)
        label = f"kron_linear {kernel.isa}, [{a.shape[0]}, {a.shape[1]}] ⊗ [{b.shape[0]}, {b.shape[1]}], float32"
        super().__init__(kernel, a.shape[1] * b.shape[1], a.shape[0] * b.shape[0], label)


def _kron(site: Site) -> Kernel | str:
    refusal = unsuitable(site, ("a", "b"))
    if refusal:
        return refusal
    a, b = site.stored("a"), site.stored("b")
    if a.numel() == 0 or b.numel() == 0:
        return "a factor is empty"
    return KronLinear(a, b, site.isa, site.arguments["scale"])


LOWERINGS: dict[str, Lowering] = {"graphwright.kron_linear": _kron}
