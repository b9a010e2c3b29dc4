"""Linears with a low-rank branch, 8-bit groups, blocks of zeros and attention over caches, at their tails."""

from __future__ import annotations

import math

import pytest
import torch
from tests.backends.triton.oracle import DTYPES, check, random, same_where_not_finite
from torch.nn import functional

from graphwright.backends.triton.kernels.attention import attention
from graphwright.backends.triton.kernels.cached_attention import append, cached_attention
from graphwright.backends.triton.kernels.epilogue import WIDEST_BRANCH, Epilogue
from graphwright.backends.triton.kernels.linear_fp8 import linear_fp8
from graphwright.backends.triton.kernels.linear_int8 import multiply_codes, round_rows, sums_of
from graphwright.backends.triton.kernels.norms import rms_norm
from graphwright.backends.triton.kernels.sparse_linear import BlockWeight, fused_linear_blocks, linear_blocks
from graphwright.ir.errors import BackendError
from graphwright.ir.ops.attention import attention as reference
from graphwright.ir.ops.cache import cached_attention as cached_reference
from graphwright.ir.ops.quantization import pack
from graphwright.ir.ops.rounded_activations import linear_fp8_dynamic, linear_nbits_dynamic
from graphwright.ir.ops.sparse import compress, linear_sparse


def branch(rows: int, outputs: int, rank: int, dtype: torch.dtype = torch.float32) -> tuple[Epilogue, torch.Tensor]:
    """An epilogue with a branch and all else, and what the branch adds."""
    down, up = random(rows, rank, seed=7, dtype=dtype), random(outputs, rank, seed=8, dtype=dtype)
    return Epilogue(down=down, up=up, scale=-0.5), -0.5 * down.double() @ up.double().t()


@pytest.mark.parametrize(("rows", "rank"), [(1, 1), (3, 16), (17, 33), (0, 4)])
def test_branches_of_other_linears(rows: int, rank: int) -> None:
    x, outputs, columns = random(rows, 64) / 8, 48, 64
    epilogue, added = branch(rows, outputs, rank)
    weight = random(outputs, columns, seed=1)
    codes, scales = (weight * 30).round().clamp(-127, 127).to(torch.int8), random(outputs, seed=2).abs()
    given = round_rows(x), codes, scales, sums_of(codes)
    plain = multiply_codes(*given, Epilogue(), torch.float32)
    check(multiply_codes(*given, epilogue, torch.float32), plain.double() + added)
    numbers = weight.to(torch.float8_e4m3fn)
    check(linear_fp8(x, numbers, scales, epilogue), linear_fp8(x, numbers, scales).double() + added)
    weight[:16, 32:] = 0
    blocks = BlockWeight.of(weight, 16)
    check(fused_linear_blocks(x, blocks, epilogue), functional.linear(x.double(), weight.double()) + added)


def test_branches_of_too_high_a_rank() -> None:
    epilogue, _ = branch(2, 16, WIDEST_BRANCH + 1)
    with pytest.raises(BackendError, match="rank 65 does not fit the registers"):
        fused_linear_blocks(random(2, 16), BlockWeight.of(random(16, 16), 16), epilogue)


@pytest.mark.parametrize(("group", "groups"), [(32, 3), (96, 2), (256, 1), (256, 2)])
def test_groups_of_8_bit_numbers(group: int, groups: int) -> None:
    rows, outputs, columns = 3, 17, group * groups
    for dtype in (torch.float32, torch.bfloat16):
        x, scales = random(rows, columns, dtype=dtype), random(outputs, groups).abs()
        codes = torch.randint(-128, 128, (outputs, columns), generator=torch.Generator().manual_seed(0))
        packed = pack((codes + 128).to(torch.uint8), 8, group, None)
        wanted = linear_nbits_dynamic(x, packed, scales, None, None, 8, group, 8, "per_group")
        own, codes = round_rows(x, group_size=group), codes.to(torch.int8)
        check(multiply_codes(own, codes, scales, sums_of(codes), Epilogue(), dtype), wanted, roundings=8)
        numbers = random(outputs, columns, seed=3).to(torch.float8_e4m3fn)
        bytes_of = numbers.view(torch.uint8).unflatten(1, (groups, group))
        for kind in ("per_group", "per_token"):
            wanted = linear_fp8_dynamic(x, bytes_of, scales, None, group, kind)
            check(linear_fp8(x, numbers, scales, per_group=kind == "per_group"), wanted, roundings=8)


@pytest.mark.parametrize(("rows", "columns", "outputs"), [(1, 1, 1), (17, 33, 5), (2, 130, 70), (0, 8, 4)])
def test_fp8_rows(rows: int, columns: int, outputs: int) -> None:
    numbers, scales, bias = random(outputs, columns, seed=1).to(torch.float8_e4m3fn), random(outputs).abs(), random(9)
    x = random(rows, 2 * columns)[:, ::2]  # neither beside each other nor aligned
    codes = numbers.view(torch.uint8).unsqueeze(1)
    wanted = linear_fp8_dynamic(x, codes, scales[:, None], bias[:1].expand(outputs), columns, "per_token")
    check(linear_fp8(x, numbers, scales, Epilogue(bias[:1].expand(outputs).contiguous())), wanted, roundings=8)


def test_groups_that_no_kernel_has() -> None:
    with pytest.raises(BackendError, match="groups of 24 columns have no kernel"):
        linear_fp8(random(2, 48), torch.zeros(4, 48).to(torch.float8_e4m3fn), torch.ones(4, 2))


def sparse_in_blocks(size: int) -> torch.Tensor:
    """Rows of blocks with all, some and none of their blocks."""
    kept = torch.tensor([[1, 1, 1, 1], [0, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]], dtype=torch.bool)
    weight = random(4 * size, 4 * size)
    return weight * kept.repeat_interleave(size, 0).repeat_interleave(size, 1)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("column", [0, 20, 63])
def test_what_is_not_finite_meets_the_zeros_of_blocks(bad: float, column: int) -> None:
    weight = sparse_in_blocks(16)
    x = random(3, 64)
    x[1, column] = bad
    mask, values, offsets = compress(weight, weight != 0)
    wanted = linear_sparse(x, mask, values, offsets, None, None, None, "float", 0)
    same_where_not_finite(linear_blocks(x, BlockWeight.of(weight, 16)), wanted)


@pytest.mark.parametrize("size", [16, 32])
def test_gradients_of_blocks(size: int) -> None:
    weight = sparse_in_blocks(size)
    packed = BlockWeight.of(weight, size)
    assert packed.density == 7 / 16
    torch.testing.assert_close(packed.transposed.density, packed.density)
    for dtype, rows in zip(DTYPES, (1, 35, 0)):
        own = BlockWeight.of(weight.to(dtype), size)
        x, bias = random(rows, 2, 8 * size, dtype=dtype)[..., ::2].requires_grad_(), random(4 * size, dtype=dtype)
        slope = random(rows, 2, 4 * size, seed=2, dtype=dtype)
        y = linear_blocks(x, own, bias.requires_grad_())
        check(y.detach(), functional.linear(x.detach().double(), weight.to(dtype).double(), bias.detach().double()))
        of_x, of_bias = torch.autograd.grad(y, (x, bias), slope)
        check(of_x, slope.double() @ weight.to(dtype).double())
        check(of_bias, slope.double().sum((0, 1)), roundings=4)


def test_what_kernels_do_not_compute() -> None:
    with pytest.raises(BackendError, match=r"x is float64, kernels compute in float16, bfloat16 and float32 .*norm"):
        rms_norm(random(2, 3).double(), None, 1e-5)
    wide = random(1, 1, 2, 257)
    with pytest.raises(BackendError, match="heads of 257 features have no kernel .*attention"):
        attention(wide, wide, wide, None, 1.0, False, 0)
    one = torch.tensor([0])
    with pytest.raises(BackendError, match="heads of 257 features have no kernel .*cached attention"):
        cached_attention(wide, wide, wide, one, one, None, 1.0, 0, 0.0)


@pytest.mark.parametrize("window", [1, 30, 70, 500])
def test_windows_that_begin_inside_a_block(window: int) -> None:
    query, key = random(1, 2, 20, 8), random(1, 1, 150, 8, seed=1)
    for causal in (True, False):
        wanted = reference(query.double(), key.double(), key.double(), None, None, 0.3, causal, window)
        check(attention(query, key, key, None, 0.3, causal, window), wanted)


CACHES = (torch.float16, torch.bfloat16, torch.int8)


@pytest.mark.parametrize("cache", CACHES, ids=str)
@pytest.mark.parametrize(("batch", "length", "window", "softcap"), [(2, 1, 0, 0.0), (1, 3, 9, 2.0), (0, 1, 0, 0.0)])
def test_caches_of_every_dtype(cache: torch.dtype, batch: int, length: int, window: int, softcap: float) -> None:
    query_type = torch.bfloat16 if (length == 1) == (cache == torch.bfloat16) else torch.float16
    heads, key_heads, capacity, width = 4, 2, 45, 20
    slots, starts = torch.arange(batch).flip(0), torch.arange(batch) * 30 + 7
    # Of other strides than their shapes say, and misaligned.
    query = random(batch, length, heads, width + 1, dtype=query_type)[..., 1:].transpose(1, 2)
    wide: list[torch.Tensor] = []
    given: dict[str, torch.Tensor] = {}
    stored: list[torch.Tensor] = []
    for name, seed in (("key", 0), ("value", 1)):
        past = random(batch, key_heads, 40, width, seed=seed).to(query_type)
        codes = torch.zeros(batch, key_heads, capacity, width, dtype=cache)
        scales = torch.zeros(batch, key_heads, capacity) if cache == torch.int8 else None
        append(codes, scales, past, torch.arange(batch), torch.zeros(batch, dtype=torch.int64))
        new = random(batch, length, key_heads, width, seed=seed + 2).to(query_type).transpose(1, 2)
        append(codes, scales, new, slots, starts)
        stored.append(codes)
        if scales is not None:
            given[f"{name}_scales"] = scales
        wide.append(codes.double() if scales is None else codes.double() * scales.double().unsqueeze(-1))
    (keys, values), options = stored, (slots, starts, None, 0.3, window, softcap)
    wanted = cached_reference(query.double(), wide[0], wide[1], *options)
    for splits in (1, 2):
        found = cached_attention(query, keys, values, *options, splits=splits, **given)
        assert found.dtype == query_type
        check(found, wanted, query_type, roundings=4)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_query_that_is_not_finite_stays_in_its_row(bad: float) -> None:
    query, keys = random(2, 2, 1, 8), random(2, 1, 20, 8, seed=1)
    slots, starts = torch.tensor([0, 1]), torch.tensor([19, 12])
    whole = cached_attention(query, keys, keys, slots, starts, None, 0.3, 0, 0.0)
    query[1, 0, 0, 3] = bad
    keys[1, :, 13:] = math.nan  # behind what the second sequence has
    found = cached_attention(query, keys, keys, slots, starts, None, 0.3, 0, 0.0, splits=2)
    assert torch.isnan(found[1, 0]).all()
    for row, head in ((0, 0), (0, 1), (1, 1)):
        check(found[row, head], whole[row, head].double(), torch.float32)


def test_infinity_in_a_cache_is_not_hidden() -> None:
    query, keys, values = random(1, 1, 1, 8), random(1, 1, 20, 8), random(1, 1, 20, 8, seed=2)
    values[0, 0, 5, 2] = math.inf
    one, last = torch.tensor([0]), torch.tensor([19])
    found = cached_attention(query, keys, values, one, last, None, 0.3, 0, 0.0)
    assert math.isinf(float(found[0, 0, 0, 2]))
    assert torch.isfinite(found[0, 0, 0, [0, 1, 3, 4, 5, 6, 7]]).all()
