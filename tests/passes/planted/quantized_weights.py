"""Weights quantised well, and in eight ways wrongly."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tests.passes.planted.catalogue import INT4, INT8, find, put, right, stored, weight_of, wrong

import graphwright as gw
from graphwright.ir.ops.quantization import pack, unpack


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
