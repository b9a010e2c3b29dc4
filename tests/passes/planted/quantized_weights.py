"""Weights quantised well, and wrongly in many ways."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tests.passes.planted.catalogue import INT4, INT8, find, put, right, stored, weight_of, wrong

import graphwright as gw
from graphwright.ir.ops.quantization import pack, unpack
from graphwright.passes.quantization.checks import local_limit
from graphwright.passes.quantization.formats import Format
from graphwright.passes.quantization.weights import quantize_weight


def _quantize(
    program: gw.Program,
    rewriter: gw.Rewriter,
    bits: int,
    change: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
) -> None:
    """Asymmetric round-to-nearest in groups of 32, with a change to (packed codes, scales, zero points)."""
    linear = find(program, "aten.linear", 4)
    weight = weight_of(program, linear)
    groups = weight.reshape(weight.shape[0], -1, 32)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scales = (high - low) / (2**bits - 1)
    zeros = (-low / scales).round().clamp(0, 2**bits - 1).to(torch.uint8)
    codes = (groups / scales[..., None]).round() + zeros[..., None]
    codes = codes.clamp(0, 2**bits - 1).to(torch.uint8).reshape(weight.shape)
    packed, scales, zeros = change(pack(codes, bits, 32, zeros), scales, zeros)
    operands = [
        stored(rewriter, linear, value, f"operand_{index}") for index, value in enumerate((packed, scales, zeros))
    ]
    put(rewriter, linear, "graphwright.linear_nbits", linear.args[0], *operands, linear.args[2], bits, 32)


@right("minilm", INT4)
def int4(program: gw.Program, rewriter: gw.Rewriter) -> None:
    _quantize(program, rewriter, 4, lambda packed, scales, zeros: (packed, scales, zeros))


@right("minilm", INT8)
def int8(program: gw.Program, rewriter: gw.Rewriter) -> None:
    _quantize(program, rewriter, 8, lambda packed, scales, zeros: (packed, scales, zeros))


@wrong("minilm", INT4)
def int4_zero_point_off_by_one(program: gw.Program, rewriter: gw.Rewriter) -> None:
    _quantize(program, rewriter, 4, lambda packed, scales, zeros: (packed, scales, zeros - 1))


@wrong("minilm", INT8)
def int8_zero_point_signed(program: gw.Program, rewriter: gw.Rewriter) -> None:
    """128 for every group, as of symmetric codes."""
    _quantize(program, rewriter, 8, lambda packed, scales, zeros: (packed, scales, torch.full_like(zeros, 128)))


@wrong("minilm", INT4)
def int4_scales_halved(program: gw.Program, rewriter: gw.Rewriter) -> None:
    _quantize(program, rewriter, 4, lambda packed, scales, zeros: (packed, scales / 2, zeros))


@wrong("minilm", INT8)
def int8_scales_by_256_steps(program: gw.Program, rewriter: gw.Rewriter) -> None:
    """``(high - low) / 256 * 16``: the step of another width."""
    _quantize(program, rewriter, 8, lambda packed, scales, zeros: (packed, scales * 16 / 17, zeros))


@wrong("minilm", INT4)
def int4_nibbles_swapped(program: gw.Program, rewriter: gw.Rewriter) -> None:
    _quantize(program, rewriter, 4, lambda packed, scales, zeros: ((packed << 4) | (packed >> 4), scales, zeros))


@wrong("minilm", INT4)
def int4_groups_in_reverse(program: gw.Program, rewriter: gw.Rewriter) -> None:
    _quantize(program, rewriter, 4, lambda packed, scales, zeros: (packed, scales.flip(1), zeros.flip(1)))


@wrong("minilm", INT8)
def int8_scales_of_the_next_group(program: gw.Program, rewriter: gw.Rewriter) -> None:
    _quantize(program, rewriter, 8, lambda packed, scales, zeros: (packed, scales.roll(1, 1), zeros))


@wrong("minilm", INT4)
def int4_codes_truncated(program: gw.Program, rewriter: gw.Rewriter) -> None:
    """Three bits kept of four."""

    def truncate(packed: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> tuple[torch.Tensor, ...]:
        codes = (unpack(packed, 4) & 12).flatten(1)
        return pack(codes, 4, 32, None), scales, zeros

    _quantize(program, rewriter, 4, truncate)


# -- other formats, held to the limits that the pass declares for them -------------------------------------------------


def _limit(dtype: str, bits: int) -> gw.Approximate:
    return gw.Approximate(max_local_error=local_limit(dtype, bits, True))


def _store(
    program: gw.Program,
    rewriter: gw.Rewriter,
    form: Format,
    change: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    read_as: str = "",
) -> None:
    """Round to nearest, with a change to (packed codes, scales), and perhaps a codebook that is not the right one."""
    linear = find(program, "aten.linear", 4)
    packed = quantize_weight(weight_of(program, linear), form)
    values = change(packed.qweight, packed.scales)
    codes, scales = (stored(rewriter, linear, value, f"operand_{index}") for index, value in enumerate(values))
    rows, bias, group = linear.args[0], linear.args[2], packed.group_size
    if form.codebook is None:
        put(rewriter, linear, "graphwright.linear_nbits", rows, codes, scales, None, bias, form.bits, group)
    else:
        put(rewriter, linear, "graphwright.linear_codebook", rows, codes, scales, bias, read_as or form.codebook, group)


def _kept(codes: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return codes, scales


INT2_FORM, INT3_FORM = Format(2, 64, True, True), Format(3, 64, True, True)
NF4_FORM, FP8_FORM = Format(4, 64, True, True, codebook="nf4"), Format(8, 64, True, True, codebook="fp8_e4m3")


@right("minilm", _limit("int", 2))
def int2(program: gw.Program, rewriter: gw.Rewriter) -> None:
    _store(program, rewriter, INT2_FORM, _kept)


@right("minilm", _limit("int", 3))
def int3(program: gw.Program, rewriter: gw.Rewriter) -> None:
    _store(program, rewriter, INT3_FORM, _kept)


@right("minilm", _limit("nf4", 4))
def nf4(program: gw.Program, rewriter: gw.Rewriter) -> None:
    _store(program, rewriter, NF4_FORM, _kept)


@right("minilm", _limit("fp8_e4m3", 8))
def fp8(program: gw.Program, rewriter: gw.Rewriter) -> None:
    _store(program, rewriter, FP8_FORM, _kept)


@wrong("minilm", _limit("int", 2))
def int2_high_bits_first(program: gw.Program, rewriter: gw.Rewriter) -> None:
    """The four codes of a byte in the other order."""

    def reverse(codes: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return pack(unpack(codes, 2).unflatten(-1, (-1, 4)).flip(-1).flatten(1), 2, 64, None), scales

    _store(program, rewriter, INT2_FORM, reverse)


@wrong("minilm", _limit("int", 2))
def int2_codes_counted_from_one(program: gw.Program, rewriter: gw.Rewriter) -> None:
    def shift(codes: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return pack((unpack(codes, 2) + 1).clamp(max=3).flatten(1), 2, 64, None), scales

    _store(program, rewriter, INT2_FORM, shift)


@wrong("minilm", _limit("int", 2))
def int2_scales_of_the_other_sign(program: gw.Program, rewriter: gw.Rewriter) -> None:
    """A symmetric scale is negative where the largest magnitude is positive."""
    _store(program, rewriter, INT2_FORM, lambda codes, scales: (codes, scales.abs()))


@wrong("minilm", _limit("int", 3))
def int3_bytes_swapped(program: gw.Program, rewriter: gw.Rewriter) -> None:
    """The three bytes of eight codes with the highest first."""

    def swap(codes: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return codes.unflatten(-1, (-1, 3)).flip(-1).flatten(-2), scales

    _store(program, rewriter, INT3_FORM, swap)


@wrong("minilm", _limit("int", 3))
def int3_scales_halved(program: gw.Program, rewriter: gw.Rewriter) -> None:
    _store(program, rewriter, INT3_FORM, lambda codes, scales: (codes, scales / 2))


@wrong("minilm", _limit("nf4", 4))
def nf4_read_as_fp4(program: gw.Program, rewriter: gw.Rewriter) -> None:
    _store(program, rewriter, NF4_FORM, _kept, "fp4")


@wrong("minilm", _limit("nf4", 4))
def nf4_nibbles_swapped(program: gw.Program, rewriter: gw.Rewriter) -> None:
    _store(program, rewriter, NF4_FORM, lambda codes, scales: ((codes << 4) | (codes >> 4), scales))


@wrong("minilm", _limit("fp8_e4m3", 8))
def fp8_of_another_bias(program: gw.Program, rewriter: gw.Rewriter) -> None:
    """Exponents counted from 8 instead of 7, as another E4M3 does."""
    _store(program, rewriter, FP8_FORM, lambda codes, scales: (codes, scales / 2))
