"""Attention against its references: masks, heads that share keys, windows, caches, and programs that share keys."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tests.backends.triton.oracle import DTYPES, check, random

from graphwright.backends.triton.kernels.attention import attention
from graphwright.backends.triton.kernels.cached_attention import append, cached_attention
from graphwright.ir.ops.attention import attention as reference
from graphwright.ir.ops.cache import cache_append
from graphwright.ir.ops.cache import cached_attention as cached_reference

# (batch, query heads, key heads, queries, keys, head dim, value dim)
SIZES = [(1, 1, 1, 1, 1, 1, 1), (2, 4, 2, 5, 9, 20, 8), (1, 2, 1, 33, 70, 16, 16), (1, 2, 2, 3, 0, 4, 4)]


@pytest.mark.parametrize(("causal", "window"), [(False, 0), (True, 0), (True, 4), (False, 3)])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_attention(sizes: tuple[int, ...], causal: bool, window: int) -> None:
    batch, heads, key_heads, queries, keys, width, value_width = sizes
    dtype = DTYPES[(queries + window) % 3]
    query = random(batch, queries, heads, width, dtype=dtype).transpose(1, 2)
    key, value = random(batch, key_heads, keys, width, dtype=dtype), random(batch, key_heads, keys, value_width + 1)
    value = value.to(dtype)[..., 1:]  # misaligned
    mask = torch.rand(batch, keys, generator=torch.Generator().manual_seed(0)) > 0.3
    for given in (None, mask, mask[:1]):
        wanted = reference(query.double(), key.double(), value.double(), given, None, 0.3, causal, window)
        check(attention(query, key, value, given, 0.3, causal, window), wanted, dtype)


def test_queries_that_see_nothing_give_zeros() -> None:
    query, key = random(1, 1, 40, 8), random(1, 1, 2, 8)  # the first 38 stand before every key
    found = attention(query, key, key, None, 1.0, True, 0)
    assert torch.equal(found[:, :, :38], torch.zeros(1, 1, 38, 8))
    hidden = torch.zeros(1, 2, dtype=torch.bool)
    assert torch.equal(attention(query, key, key, hidden, 1.0, False, 0), torch.zeros(1, 1, 40, 8))


def test_a_score_that_is_not_a_number_stays_in_its_row() -> None:
    query, key, value = random(1, 1, 3, 8), random(1, 1, 5, 8), random(1, 1, 5, 8, seed=1)
    query[0, 0, 1, 0] = math.nan
    found = attention(query, key, value, None, 1.0, False, 0)
    assert torch.isnan(found[0, 0, 1]).all()
    assert torch.isfinite(found[0, 0, [0, 2]]).all()


def _cache(batch: int, key_heads: int, capacity: int, width: int, dtype: torch.dtype) -> tuple[Any, ...]:
    """Caches whose unwritten part is NaN, and a step into them."""
    slots = torch.randperm(batch + 1, generator=torch.Generator().manual_seed(1))[:batch]
    starts = torch.arange(batch) * 7 % (capacity - 5)
    caches = [random(batch + 1, key_heads, capacity, width, seed=seed).to(dtype) for seed in (0, 1)]
    for cache in caches:
        for slot, start in zip(slots, starts):
            cache[slot, :, start:] = math.nan
    return slots, starts, caches


@pytest.mark.parametrize("splits", [None, 1, 4])
@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("options", [(0, 0.0, False), (6, 0.0, False), (0, 2.0, True)], ids=str)
def test_cached_attention(options: tuple[int, float, bool], length: int, splits: int | None) -> None:
    window, softcap, has_slopes = options
    heads, key_heads, width, dtype = 6, 2, 20, DTYPES[length % 3 if splits else 0]
    slots, starts, (keys, values) = _cache(2, key_heads, 75, width, dtype)
    query, new = (random(2, count, length, width, seed=length, dtype=dtype) for count in (heads, key_heads))
    wanted_keys, wanted_values = (cache_append(cache, new, slots, starts) for cache in (keys, values))
    for cache in (keys, values):
        append(cache, None, new, slots, starts)
    torch.testing.assert_close(keys, wanted_keys, rtol=0, atol=0, equal_nan=True)
    slopes = random(heads).abs() if has_slopes else None
    found = cached_attention(query, keys, values, slots, starts, slopes, 0.2, window, softcap, splits=splits)
    keys, values = wanted_keys.double(), wanted_values.double()
    wide = None if slopes is None else slopes.double()
    check(found, cached_reference(query.double(), keys, values, slots, starts, wide, 0.2, window, softcap), dtype)


def test_an_int8_cache() -> None:
    slots, starts = torch.tensor([1, 0]), torch.tensor([0, 30])
    history, query = random(2, 2, 40, 12), random(2, 4, 3, 12, seed=1)
    codes = [torch.zeros(2, 2, 40, 12, dtype=torch.int8) for _ in range(2)]
    scales = [torch.full((2, 2, 40), math.nan) for _ in range(2)]
    tensors = []
    for cache, own, sign in zip(codes, scales, (1.0, -0.5)):
        append(cache, own, history[:, :, :36] * sign, torch.tensor([0, 1]), torch.tensor([0, 0]))
        wide = cache.double() * own.nan_to_num().double().unsqueeze(-1)
        assert (
            float((wide[:, :, :36] - history[:, :, :36] * sign).abs().max())
            <= 0.5 * float(own.nan_to_num().max()) + 1e-6
        )
        tensors.append(wide)
    given = {"key_scales": scales[0], "value_scales": scales[1]}
    found = cached_attention(query, codes[0], codes[1], slots, starts, None, 0.3, 0, 0.0, splits=2, **given)
    keys, values = tensors
    check(found, cached_reference(query.double(), keys, values, slots, starts, None, 0.3, 0, 0.0), roundings=8)


def test_nothing_is_written_beyond_the_capacity() -> None:
    cache, new = torch.zeros(2, 1, 4, 3), torch.ones(1, 1, 3, 3)
    append(cache, None, new, torch.tensor([0]), torch.tensor([2]))
    assert torch.equal(cache[0, 0, 2:], torch.ones(2, 3))
    assert not cache[1].any()
