"""Attention over a cache of keys and values, and writing into it."""

from __future__ import annotations

import torch
import triton.language as tl

from graphwright.backends.triton.configurations import Config, choose
from graphwright.backends.triton.kernels.attention import absorb, check_heads, strides
from graphwright.backends.triton.kernels.products import operand_type, processors, tanh
from graphwright.backends.triton.launching import blocks_of, chosen_architecture, kernel, launch, power_of_two

# Programs to a processor, when programs share out the keys of a head.
_WAVES = 2
# The most programs that share the keys of a head.
_MOST_SPLITS = 64


@kernel
def _append(
    cache: tl.tensor,
    scales: tl.tensor,
    new: tl.tensor,
    slots: tl.tensor,
    starts: tl.tensor,
    heads: tl.tensor,
    length: tl.tensor,
    capacity: tl.tensor,
    width: tl.tensor,
    n_batch: tl.tensor,
    n_head: tl.tensor,
    n_token: tl.tensor,
    WIDTH: tl.constexpr,
) -> None:
    batch, token = (tl.program_id(0) // length).to(tl.int64), tl.program_id(0) % length
    head = tl.program_id(1)
    d = tl.arange(0, WIDTH)
    value = tl.load(new + batch * n_batch + head * n_head + token * n_token + d, d < width, 0.0).to(tl.float32)
    position = tl.load(starts + batch) + token
    row = (tl.load(slots + batch) * heads + head) * capacity + position
    if position < capacity:
        if scales is not None:
            scale = tl.max(tl.abs(value), 0) / 127.0
            steps = value / tl.where(scale == 0.0, 1.0, scale)
            # To the nearest whole number: adding 1.5 * 2**23 leaves no bits behind the point.
            value = (steps + 12582912.0) - 12582912.0
            tl.store(scales + row, scale)
        tl.store(cache + row * width + d, value.to(cache.dtype.element_ty), d < width)


@kernel
def _cached_attention(
    query: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    key_scales: tl.tensor,
    value_scales: tl.tensor,
    slots: tl.tensor,
    starts: tl.tensor,
    slopes: tl.tensor,
    y: tl.tensor,
    partial: tl.tensor,
    largests: tl.tensor,
    sums: tl.tensor,
    key_heads: tl.tensor,
    shared: tl.tensor,
    length: tl.tensor,
    capacity: tl.tensor,
    width: tl.tensor,
    value_width: tl.tensor,
    q_batch: tl.tensor,
    q_head: tl.tensor,
    q_token: tl.tensor,
    scale: tl.tensor,
    window: tl.tensor,
    softcap: tl.tensor,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DOT: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BQ: tl.constexpr,
    BT: tl.constexpr,
) -> None:
    batch, own = (tl.program_id(1) // key_heads).to(tl.int64), tl.program_id(1) % key_heads
    # A row is a token of one of the query heads that share the key head: all read each key once.
    rows = shared * length
    row = tl.program_id(0) * BQ + tl.arange(0, BQ)
    head, token = own * shared + row % shared, row // shared
    d, e, t = tl.arange(0, WIDTH), tl.arange(0, VALUE_WIDTH), tl.arange(0, BT)
    at = query + batch * q_batch + head[:, None] * q_head + token[:, None] * q_token + d[None, :]
    own_query = tl.load(at, (row < rows)[:, None] & (d < width)[None, :], 0.0).to(DOT)
    start = tl.load(starts + batch).to(tl.int32)
    place = start + token
    stop = start + tl.minimum(length, (tl.program_id(0) * BQ + BQ - 1) // shared + 1)
    begin = stop * 0
    if WINDOW:
        begin = tl.maximum(start + tl.program_id(0) * BQ // shared - window + 1, 0)
    share = tl.cdiv(tl.cdiv(stop - begin, tl.num_programs(2)), BT) * BT
    first = begin + tl.program_id(2) * share
    slot = tl.load(slots + batch)
    base = (slot * key_heads + own) * capacity
    total = tl.zeros((BQ, VALUE_WIDTH), tl.float32)
    largest = tl.zeros((BQ,), tl.float32) + float("-inf")
    weights = tl.zeros((BQ,), tl.float32)
    for block in range(first, tl.minimum(first + share, stop), BT):
        position = block + t
        there = position < stop
        key_at = keys + (base + position)[None, :] * width + d[:, None]
        block_key = tl.load(key_at, there[None, :] & (d < width)[:, None], 0.0).to(DOT)
        value_at = values + (base + position)[:, None] * value_width + e[None, :]
        block_value = tl.load(value_at, there[:, None] & (e < value_width)[None, :], 0.0).to(DOT)
        scores = tl.dot(own_query, block_key, input_precision="ieee") * scale
        if key_scales is not None:
            scores = scores * tl.load(key_scales + base + position, there, 0.0)[None, :]
        if SOFTCAP:
            scores = softcap * tanh(scores / softcap)
        distance = position[None, :] - place[:, None]
        if slopes is not None:
            scores += tl.load(slopes + head, row < rows, 0.0).to(tl.float32)[:, None] * distance.to(tl.float32)
        seen = there[None, :] & (distance <= 0)
        if WINDOW:
            seen = seen & (distance > -window)
        scores = tl.where(seen, scores * 1.4426950408889634, float("-inf"))
        if value_scales is not None:
            factors = tl.load(value_scales + base + position, there, 0.0)
            total, largest, weights = absorb(total, largest, weights, scores, block_value, factors, DOT)
        else:
            total, largest, weights = absorb(total, largest, weights, scores, block_value, None, DOT)
    inside = (row < rows)[:, None] & (e < value_width)[None, :]
    if partial is not None:
        at_row = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * rows + row
        tl.store(partial + at_row[:, None] * value_width + e[None, :], total, inside)
        tl.store(largests + at_row, largest, row < rows)
        tl.store(sums + at_row, weights, row < rows)
    else:
        total = total / tl.where(weights == 0.0, 1.0, weights)[:, None]
        result = ((batch * key_heads * shared + head) * length + token)[:, None] * value_width + e[None, :]
        tl.store(y + result, total.to(y.dtype.element_ty), inside)


@kernel
def _join(
    partial: tl.tensor,
    largests: tl.tensor,
    sums: tl.tensor,
    y: tl.tensor,
    key_heads: tl.tensor,
    shared: tl.tensor,
    length: tl.tensor,
    value_width: tl.tensor,
    SPLITS: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    group = tl.program_id(1)
    e, split = tl.arange(0, VALUE_WIDTH), tl.arange(0, SPLITS)
    at = (split * tl.num_programs(1) + group).to(tl.int64) * tl.num_programs(0) + row
    largest = tl.load(largests + at)
    top = tl.max(largest, 0)
    shrink = tl.exp2(largest - tl.where(top == float("-inf"), 0.0, top))
    weight = tl.sum(tl.load(sums + at) * shrink, 0)
    inside = (split >= 0)[:, None] & (e < value_width)[None, :]
    parts = tl.load(partial + at[:, None] * value_width + e[None, :], inside, 0.0)
    total = tl.sum(parts * shrink[:, None], 0) / tl.where(weight == 0.0, 1.0, weight)
    batch, own = group // key_heads, group % key_heads
    head, token = own * shared + row % shared, row // shared
    place = ((batch * key_heads * shared + head) * length + token).to(tl.int64) * value_width
    tl.store(y + place + e, total.to(y.dtype.element_ty), e < value_width)


def append(
    cache: torch.Tensor,
    scales: torch.Tensor | None,
    new: torch.Tensor,
    slots: torch.Tensor,
    starts: torch.Tensor,
) -> None:
    """Write keys or values of a step into a cache, in place; see :func:`graphwright.ir.ops.cache.cache_append`.

    Args:
        cache: ``[N, H, C, D]``, contiguous, floating or int8.
        scales: float32 ``[N, H, C]`` of an int8 cache, ``greatest |x| / 127`` of each head and position; else ``None``.
        new: ``[B, H, S, D]``.
        slots: int64 ``[B]``.
        starts: int64 ``[B]``; positions beyond the capacity are not written.
    """
    if new.stride(3) != 1:
        new = new.contiguous()
    batch, heads, length, width = new.shape
    launch(
        _append,
        (batch * length, heads),
        Config({}, 1 if width <= 64 else 2, 1),
        cache=cache,
        scales=scales,
        new=new,
        slots=slots,
        starts=starts,
        heads=heads,
        length=length,
        capacity=cache.shape[2],
        width=width,
        **strides("n", new),
        WIDTH=power_of_two(width),
    )


def cached_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    starts: torch.Tensor,
    slopes: torch.Tensor | None,
    scale: float,
    window: int,
    softcap: float,
    *,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
    splits: int | None = None,
) -> torch.Tensor:
    """Causal attention of new tokens over a cache, see :func:`graphwright.ir.ops.cache.cached_attention`.

    Programs share out the keys of a head, and a second kernel joins what they found (Dao et al. 2023,
    "Flash-Decoding"). How many share depends on shapes alone, so a captured step serves every length.

    Args:
        query: ``[B, Hq, S, D]``.
        keys: ``[N, Hkv, C, D]``, contiguous, floating or int8.
        values: ``[N, Hkv, C, Dv]``, likewise.
        slots: int64 ``[B]``.
        starts: int64 ``[B]``.
        slopes: ``[Hq]`` or ``None``.
        scale: factor on the products.
        window: 0 for none.
        softcap: 0 for none.
        key_scales: float32 ``[N, Hkv, C]`` of int8 keys.
        value_scales: likewise of values.
        splits: programs that share the keys of a head, a power of two; as many as fill the GPU by default.

    Raises:
        BackendError: heads are too wide.
    """
    check_heads(query.shape[3], values.shape[3], where="cached attention kernel")
    if query.stride(3) != 1:
        query = query.contiguous()
    batch, heads, length, width = query.shape
    key_heads, capacity, value_width = keys.shape[1], keys.shape[2], values.shape[3]
    shared = heads // key_heads
    rows = shared * length
    is_wide = query.dtype == torch.float32
    config = choose(f"cached_attention{' float32' * is_wide}", chosen_architecture(query.device))
    block = 16 if rows <= 16 or is_wide else 64
    grid = blocks_of(rows, block), batch * key_heads
    if splits is None:
        splits = _splits(grid[0] * grid[1], capacity, config.blocks["BT"], processors(query.device))
    y = torch.empty(batch, heads, length, value_width, dtype=query.dtype, device=query.device)
    partial = largests = sums = None
    if splits > 1:
        partial = torch.empty(splits, grid[1], rows, value_width, dtype=torch.float32, device=query.device)
        largests = torch.empty(splits, grid[1], rows, dtype=torch.float32, device=query.device)
        sums = torch.empty_like(largests)
    launch(
        _cached_attention,
        (*grid, splits),
        config,
        query=query,
        keys=keys,
        values=values,
        key_scales=key_scales,
        value_scales=value_scales,
        slots=slots,
        starts=starts,
        slopes=slopes,
        y=y,
        partial=partial,
        largests=largests,
        sums=sums,
        key_heads=key_heads,
        shared=shared,
        length=length,
        capacity=capacity,
        width=width,
        value_width=value_width,
        **strides("q", query),
        scale=float(scale),
        window=window,
        softcap=float(softcap),
        WINDOW=window > 0,
        SOFTCAP=softcap > 0,
        DOT=operand_type(query.dtype),
        WIDTH=power_of_two(width, 16),
        VALUE_WIDTH=power_of_two(value_width, 16),
        BQ=block,
    )
    if partial is not None:
        launch(
            _join,
            (rows, grid[1]),
            Config({}, 4, 1),
            partial=partial,
            largests=largests,
            sums=sums,
            y=y,
            key_heads=key_heads,
            shared=shared,
            length=length,
            value_width=value_width,
            SPLITS=splits,
            VALUE_WIDTH=power_of_two(value_width),
        )
    return y


def _splits(programs: int, capacity: int, block: int, processors: int) -> int:
    """A power of two: enough to fill the GPU, with two blocks of keys at least to each where the cache is full."""
    splits = 1
    while programs * splits < _WAVES * processors and capacity >= 4 * block * splits and splits < _MOST_SPLITS:
        splits *= 2
    return splits
