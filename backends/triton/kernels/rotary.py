"""Rotary position embedding, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl

from graphwright.backends.triton.configurations import Config
from graphwright.backends.triton.launching import apply, blocks_of, kernel, launch, power_of_two

_HEADS = 8


@kernel
def _rotary(
    x: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    y: tl.tensor,
    heads: tl.tensor,
    length: tl.tensor,
    half: tl.tensor,
    width: tl.tensor,
    x_batch: tl.tensor,
    x_head: tl.tensor,
    x_token: tl.tensor,
    y_batch: tl.tensor,
    y_head: tl.tensor,
    y_token: tl.tensor,
    cos_batch: tl.tensor,
    cos_token: tl.tensor,
    INTERLEAVED: tl.constexpr,
    BACKWARD: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
) -> None:
    batch, token = tl.program_id(0) // length, tl.program_id(0) % length
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    pair = tl.arange(0, HALF)
    first, step = (2 * pair, 1) if INTERLEAVED else (pair, half)
    second = first + step
    within = pair < half
    angle = batch.to(tl.int64) * cos_batch + token * cos_token
    cos_a = tl.load(cos + angle + first, within, 0.0).to(tl.float32)[None, :]
    cos_b = tl.load(cos + angle + second, within, 0.0).to(tl.float32)[None, :]
    sin_a = tl.load(sin + angle + first, within, 0.0).to(tl.float32)[None, :]
    sin_b = tl.load(sin + angle + second, within, 0.0).to(tl.float32)[None, :]
    source = x + batch.to(tl.int64) * x_batch + token * x_token + head[:, None] * x_head
    target = y + batch.to(tl.int64) * y_batch + token * y_token + head[:, None] * y_head
    there = head < heads
    inside = there[:, None] & within[None, :]
    a = tl.load(source + first[None, :], inside, 0.0).to(tl.float32)
    b = tl.load(source + second[None, :], inside, 0.0).to(tl.float32)
    if BACKWARD:
        new_a = a * cos_a + b * sin_b
        new_b = b * cos_b - a * sin_a
    else:
        new_a = a * cos_a - b * sin_a
        new_b = b * cos_b + a * sin_b
    tl.store(target + first[None, :], new_a.to(y.dtype.element_ty), inside)
    tl.store(target + second[None, :], new_b.to(y.dtype.element_ty), inside)
    if REST > 0:
        rest = 2 * half + tl.arange(0, REST)
        others = there[:, None] & (rest < width)[None, :]
        tl.store(target + rest[None, :], tl.load(source + rest[None, :], others, 0.0), others)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, backward: bool) -> torch.Tensor:
    if x.stride(3) != 1:
        x = x.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    batch, heads, length, width = x.shape
    y = torch.empty_like(x)
    if y.stride(3) != 1:
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    half, rest = cos.shape[2] // 2, width - cos.shape[2]
    config = Config({"HEADS": min(_HEADS, power_of_two(heads)), "HALF": power_of_two(half)}, 4, 1)
    launch(
        _rotary,
        (batch * length, blocks_of(heads, config.blocks["HEADS"])),
        config,
        x=x,
        cos=cos,
        sin=sin,
        y=y,
        heads=heads,
        length=length,
        half=half,
        width=width,
        **{f"x_{name}": x.stride(axis) for axis, name in enumerate(("batch", "head", "token"))},
        **{f"y_{name}": y.stride(axis) for axis, name in enumerate(("batch", "head", "token"))},
        cos_batch=cos.stride(0) if cos.shape[0] > 1 else 0,
        cos_token=cos.stride(1),
        INTERLEAVED=interleaved,
        BACKWARD=backward,
        REST=power_of_two(rest) if rest else 0,
    )
    return y


class _Rotary(torch.autograd.Function):
    """The rotation; turning back is its gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _rotate(x, cos, sin, interleaved, False)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _rotate(grads[0], cos, sin, ctx.interleaved, True), None, None, None


def rotary_embedding(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """``(x_a, x_b) -> (x_a cos_a - x_b sin_a, x_b cos_b + x_a sin_b)`` for every pair of features (Su et al. 2021, eq.
    34), in float32; see :func:`graphwright.ir.ops.position.rotary_embedding`.

    Args:
        x: ``[B, H, S, D]``, of any strides.
        cos: ``[B or 1, S, R]``; gradients flow to x alone.
        sin: like cos.
        interleaved: whether pairs are neighbours.
    """
    result: torch.Tensor = apply(_Rotary, x, cos, sin, interleaved)
    return result
