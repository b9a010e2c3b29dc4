"""Attention whose two matrix products multiply 8-bit codes: ``Q Kᵀ``, and probabilities times ``V``.

Queries, keys and values are rounded symmetrically to INT8 with one scale for each head and position, which for keys and
values is how an INT8 cache stores them: what later tokens bring changes nothing about earlier ones, and padding changes
nothing about the rest. The scales of values belong to the positions that are summed over, so they are multiplied into
the probabilities first, and these are rounded to unsigned 8 bits with one scale for each query:

    y = scale(p') Σ_j code(p')_j code(v_j),    p'_j = p_j · scale(v_j),    scale(p') = max_j p'_j / 255
"""

from __future__ import annotations

import torch

from graphwright.ir.ops.attention import ATTENTION, allowed_keys
from graphwright.ir.ops.definition import OpDefinition

# Smaller ranges count as nothing: the reciprocal of their step overflows.
_TINY = 1e-35


def round_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric INT8 codes of rows, ``x ≈ code · scale`` with ``scale = max |x| / 127``.

    Args:
        x: ``[..., D]``, floating.

    Returns:
        codes ``[..., D]``, integers in x's dtype, and scales ``[..., 1]``; a row that holds NaN or infinity has the
        scale NaN.
    """
    with torch.no_grad():
        top = x.abs().amax(-1, keepdim=True) if x.shape[-1] else x.new_zeros((*x.shape[:-1], 1))
        some = ~(top < _TINY)
        inverse = torch.where(some, 127 / top, torch.zeros_like(top))
        scale = torch.where(some, torch.where(torch.isfinite(top), top, torch.nan) / 127, torch.zeros_like(top))
    return _nearest(x * inverse).clamp(-127, 127).nan_to_num(0.0), scale


def _nearest(steps: torch.Tensor) -> torch.Tensor:
    """Rounded, with the gradient of the identity (straight-through, Bengio et al. 2013)."""
    if torch.is_grad_enabled() and steps.requires_grad:
        return steps + (torch.round(steps) - steps).detach()
    return torch.round(steps)


def attention_int8(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: float,
    causal: bool,
    window: int,
) -> torch.Tensor:
    """``graphwright.attention`` with both products in INT8 (the module says how values are rounded).

    Args:
        query: ``[B, Hq, S, D]``.
        key: ``[B, Hkv, T, D]``; query head ``h`` reads key head ``h // (Hq / Hkv)``.
        value: ``[B, Hkv, T, Dv]``.
        key_mask: bool ``[B or 1, T]``, True where a key may be attended, or ``None``.
        bias: added to the scores, broadcastable to ``[B, Hq, S, T]``; bool means True = may be attended. Or ``None``.
        scale: factor on the scores.
        causal: query ``i`` sees keys ``j <= i + T - S`` only.
        window: when above 0, also only keys ``j > i + T - S - window``.

    Returns:
        ``[B, Hq, S, Dv]`` of query's dtype; a query with nothing to attend gives zeros. Sums of products are exact,
        softmax is computed in float32 or wider. Gradients are those of attention on the rounded values
        (straight-through). NaN or infinity in a key or value that a query may attend makes its result NaN.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = _scores(query.to(wide), key.to(wide)) * scale
    allowed = allowed_keys(scores, key_mask, causal, window)
    if bias is not None and bias.dtype == torch.bool:
        allowed = bias if allowed is None else allowed & bias
    elif bias is not None:
        scores = scores + bias.to(wide)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    empty = (scores == float("-inf")).all(dim=-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(empty, 0.0), dim=-1).masked_fill(empty, 0.0)
    return _weighted(weights, value.to(wide)).to(query.dtype)


def _scores(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """``[B, Hq, S, T]`` products of rounded queries and keys."""
    groups = query.shape[1] // key.shape[1]
    (left, first), (right, second) = round_rows(query), round_rows(key)
    right, second = right.repeat_interleave(groups, dim=1), second.repeat_interleave(groups, dim=1)
    # Exact: products of two bytes, and no head has the 2**10 = 1024 features it takes to leave float32's integers.
    exact = torch.float32 if query.shape[-1] < 1024 else torch.float64
    sums = torch.matmul(left.to(exact), right.to(exact).transpose(-1, -2)).to(query.dtype)
    return sums * first * second.transpose(-1, -2)


def _weighted(weights: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """``[B, Hq, S, Dv]`` of probabilities ``[B, Hq, S, T]`` and values ``[B, Hkv, T, Dv]``, both rounded."""
    groups = weights.shape[1] // value.shape[1]
    codes, scale = round_rows(value)
    codes, scale = codes.repeat_interleave(groups, dim=1), scale.repeat_interleave(groups, dim=1)
    factors = weights * scale.transpose(-1, -2)
    with torch.no_grad():
        top = factors.amax(-1, keepdim=True) if factors.shape[-1] else factors.new_zeros((*factors.shape[:-1], 1))
        some = ~(top < _TINY)
        inverse = torch.where(some, 255 / top, torch.zeros_like(top))
    steps = _nearest(factors * inverse)
    # Sums of 255 · 127 · T leave float32's integers from T = 519 on; float64 holds them.
    sums = torch.matmul(steps.double(), codes.double()).to(weights.dtype)
    return sums * torch.where(some, top / 255, torch.zeros_like(top))


ATTENTION_INT8 = OpDefinition(
    name="attention_int8",
    schema=(
        "(Tensor query, Tensor key, Tensor value, Tensor? key_mask, Tensor? bias, float scale, bool causal, int window)"
        " -> Tensor"
    ),
    reference=attention_int8,
    fake=ATTENTION.fake,
    macs=ATTENTION.macs,
    differentiable=("query", "key", "value", "bias"),
)
