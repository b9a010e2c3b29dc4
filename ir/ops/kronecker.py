"""A linear whose weight is a Kronecker product, computed without forming it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from graphwright.ir.ops.definition import OpDefinition


def kron_linear(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """``y = scale · x (A ⊗ B)ᵀ`` (Edalati et al. 2022, "KronA", eq. 4 to 6).

    With ``x`` as a matrix ``X [a2, b2]``, row after row, ``y`` is ``A X Bᵀ [a1, b1]``, row after row. That is the
    paper's ``(A ⊗ B) vec(x) = vec(B mat(x) Aᵀ)``, whose ``mat`` and ``vec`` go column after column. The product that
    leaves less work for the other is taken first, see :func:`b_first`.

    Args:
        x: ``[..., a2 · b2]``, floating.
        a: ``[a1, a2]``.
        b: ``[b1, b2]``, of x's dtype as ``a``.
        scale: factor of the result.

    Returns:
        ``[..., a1 · b1]`` of x's dtype.
    """
    grid = x.reshape(*x.shape[:-1], a.shape[1], b.shape[1])
    if b_first(tuple(a.shape), tuple(b.shape)):
        result = torch.matmul(a, torch.matmul(grid, b.t()))
    else:
        result = torch.matmul(torch.matmul(a, grid), b.t())
    # A factor of 1 is no product, so that what trains with it sees the same bits.
    return (result if scale == 1.0 else result * scale).reshape(*x.shape[:-1], a.shape[0] * b.shape[0])


def b_first(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Whether ``A (X Bᵀ)`` takes no more multiplications than ``(A X) Bᵀ``.

    Args:
        a: sizes ``[a1, a2]``.
        b: sizes ``[b1, b2]``.
    """
    return products(a, b, first_b=True) <= products(a, b, first_b=False)


def products(a: tuple[int, ...], b: tuple[int, ...], *, first_b: bool) -> int:
    """Multiply-accumulates for one row of ``x``."""
    (a1, a2), (b1, b2) = a, b
    return a2 * b2 * b1 + a1 * a2 * b1 if first_b else a1 * a2 * b2 + a1 * b2 * b1


def _fake(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    if a.dim() != 2 or b.dim() != 2:
        raise ValueError(f"a {list(a.shape)} and b {list(b.shape)} must be matrices")
    if not x.dtype == a.dtype == b.dtype or not x.dtype.is_floating_point:
        raise ValueError(f"x, a and b must be of one floating dtype, not {x.dtype}, {a.dtype} and {b.dtype}")
    wanted = a.shape[1] * b.shape[1]
    torch._check(
        x.shape[-1] == wanted, lambda: f"x has {x.shape[-1]} features, a {list(a.shape)} and b {list(b.shape)} {wanted}"
    )
    return x.new_empty((*x.shape[:-1], a.shape[0] * b.shape[0]))


def _macs(arguments: Mapping[str, Any]) -> int:
    a, b = (tuple(int(size) for size in arguments[name]) for name in ("a", "b"))
    count = min(products(a, b, first_b=True), products(a, b, first_b=False))
    for size in arguments["x"][:-1]:
        count *= int(size)
    return count


KRON_LINEAR = OpDefinition(
    name="kron_linear",
    schema="(Tensor x, Tensor a, Tensor b, float scale=1.0) -> Tensor",
    reference=kron_linear,
    fake=_fake,
    macs=_macs,
    differentiable=("x", "a", "b"),
)
