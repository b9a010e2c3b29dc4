"""Attention without its scores in memory: a block of queries goes over the keys once."""

from __future__ import annotations

import torch
import triton.language as tl

from graphwright.backends.triton.configurations import Config, choose
from graphwright.backends.triton.kernels.products import operand_type
from graphwright.backends.triton.launching import blocks_of, chosen_architecture, kernel, launch, part, power_of_two
from graphwright.ir.errors import BackendError

# The widest head whose tiles fit the registers.
WIDEST_HEAD = 256


@part
def absorb(
    total: tl.tensor,
    largest: tl.tensor,
    weights: tl.tensor,
    scores: tl.tensor,
    values: tl.tensor,
    value_scales: tl.tensor,
    DOT: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Take in a block of keys: scores ``[Q, T]`` in powers of two, ``-inf`` where hidden, and values ``[T, D]``."""
    new = tl.maximum(largest, tl.max(scores, 1))
    # Of a row with nothing to see so far the largest score is -inf, from which nothing can be subtracted.
    base = tl.where(new == float("-inf"), 0.0, new)
    power = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(largest - base)
    weights = weights * shrink + tl.sum(power, 1)
    if value_scales is not None:
        power = power * value_scales[None, :]
    total = tl.dot(power.to(DOT), values, total * shrink[:, None], input_precision="ieee")
    return total, new, weights


@kernel
def _attention(
    query: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    key_mask: tl.tensor,
    y: tl.tensor,
    heads: tl.tensor,
    shared: tl.tensor,
    queries: tl.tensor,
    keys: tl.tensor,
    width: tl.tensor,
    value_width: tl.tensor,
    q_batch: tl.tensor,
    q_head: tl.tensor,
    q_token: tl.tensor,
    k_batch: tl.tensor,
    k_head: tl.tensor,
    k_token: tl.tensor,
    v_batch: tl.tensor,
    v_head: tl.tensor,
    v_token: tl.tensor,
    mask_batch: tl.tensor,
    scale: tl.tensor,
    window: tl.tensor,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    DOT: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BQ: tl.constexpr,
    BT: tl.constexpr,
) -> None:
    batch, head = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    own = head // shared
    # The last queries of a causal attention see most: they begin first.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    q = block * BQ + tl.arange(0, BQ)
    d, e, t = tl.arange(0, WIDTH), tl.arange(0, VALUE_WIDTH), tl.arange(0, BT)
    at = query + batch * q_batch + head * q_head + q[:, None] * q_token + d[None, :]
    own_query = tl.load(at, (q < queries)[:, None] & (d < width)[None, :], 0.0).to(DOT)
    total = tl.zeros((BQ, VALUE_WIDTH), tl.float32)
    largest = tl.zeros((BQ,), tl.float32) + float("-inf")
    weights = tl.zeros((BQ,), tl.float32)
    last = q + (keys - queries)
    stop, begin = keys, 0
    if CAUSAL:
        stop = tl.maximum(tl.minimum(keys, (block + 1) * BQ + keys - queries), 0)
    if WINDOW:
        begin = tl.maximum(block * BQ + keys - queries - window + 1, 0) // BT * BT
    for start in range(begin, stop, BT):
        position = start + t
        there = position < keys
        at_key = key + batch * k_batch + own * k_head + position[None, :] * k_token + d[:, None]
        block_key = tl.load(at_key, there[None, :] & (d < width)[:, None], 0.0).to(DOT)
        at_value = value + batch * v_batch + own * v_head + position[:, None] * v_token + e[None, :]
        block_value = tl.load(at_value, there[:, None] & (e < value_width)[None, :], 0.0).to(DOT)
        scores = tl.dot(own_query, block_key, input_precision="ieee") * scale
        seen = there[None, :] & (q < queries)[:, None]
        if key_mask is not None:
            seen = seen & (tl.load(key_mask + batch * mask_batch + position, there, 0) != 0)[None, :]
        if CAUSAL:
            seen = seen & (position[None, :] <= last[:, None])
        if WINDOW:
            seen = seen & (position[None, :] > last[:, None] - window)
        scores = tl.where(seen, scores, float("-inf"))
        total, largest, weights = absorb(total, largest, weights, scores, block_value, None, DOT)
    # A query that sees nothing has weight 0 and gives zeros.
    total = total / tl.where(weights == 0.0, 1.0, weights)[:, None]
    place = ((batch * heads + head) * queries + q[:, None]) * value_width + e[None, :]
    tl.store(y + place, total.to(y.dtype.element_ty), (q < queries)[:, None] & (e < value_width)[None, :])


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_mask: torch.Tensor | None,
    scale: float,
    causal: bool,
    window: int,
) -> torch.Tensor:
    """``softmax(scale · Q Kᵀ + mask) V``, see :func:`graphwright.ir.ops.attention.attention`; without gradients.

    The largest score and the sum of weights of each query are carried along, and what has been summed is scaled down as
    a larger score comes (Milakov & Gimelshein 2018, alg. 3; Dao 2023, "FlashAttention-2", alg. 1). Weights are rounded
    to the dtype before they meet the values.

    Args:
        query: ``[B, Hq, S, D]``, float16, bfloat16 or float32, ``D`` at most :data:`WIDEST_HEAD`.
        key: ``[B, Hkv, T, D]``.
        value: ``[B, Hkv, T, Dv]``.
        key_mask: bool ``[B or 1, T]`` or ``None``.
        scale: factor on the scores.
        causal: query ``i`` sees keys ``j <= i + T - S`` only.
        window: when above 0, also only keys ``j > i + T - S - window``.

    Raises:
        BackendError: heads are too wide.
    """
    check_heads(query.shape[3], value.shape[3], where="attention kernel")
    query, key, value = (each if each.stride(3) == 1 else each.contiguous() for each in (query, key, value))
    batch, heads, queries, width = query.shape
    keys, value_width = value.shape[2], value.shape[3]
    y = torch.empty(batch, heads, queries, value_width, dtype=query.dtype, device=query.device)
    config = _config(max(width, value_width), query)
    mask = None if key_mask is None else key_mask.contiguous().view(torch.uint8)
    launch(
        _attention,
        (blocks_of(queries, config.blocks["BQ"]), batch * heads),
        config,
        query=query,
        key=key,
        value=value,
        key_mask=mask,
        y=y,
        heads=heads,
        shared=heads // key.shape[1],
        queries=queries,
        keys=keys,
        width=width,
        value_width=value_width,
        **strides("q", query),
        **strides("k", key),
        **strides("v", value),
        mask_batch=0 if mask is None or mask.shape[0] == 1 else mask.stride(0),
        # Powers of two instead of e: one instruction.
        scale=scale * LOG2_E,
        window=window,
        CAUSAL=causal,
        WINDOW=window > 0,
        DOT=operand_type(query.dtype),
        WIDTH=power_of_two(width, 16),
        VALUE_WIDTH=power_of_two(value_width, 16),
    )
    return y


LOG2_E = 1.4426950408889634


def check_heads(*widths: int, where: str) -> None:
    """Check that heads are no wider than kernels hold.

    Raises:
        BackendError: one is.
    """
    if max(widths) > WIDEST_HEAD:
        raise BackendError(
            f"heads of {max(widths)} features have no kernel",
            where=where,
            hint=f"heads of up to {WIDEST_HEAD} have; in a program wider ones run in torch",
        )


def strides(prefix: str, tensor: torch.Tensor) -> dict[str, int]:
    """Strides of the first three axes as a kernel's arguments."""
    return {f"{prefix}_{name}": tensor.stride(axis) for axis, name in enumerate(("batch", "head", "token"))}


def _config(width: int, query: torch.Tensor) -> Config:
    kind = "float32" if query.dtype == torch.float32 else str(min(256, power_of_two(width, 64)))
    return choose(f"attention {kind}", chosen_architecture(query.device))
