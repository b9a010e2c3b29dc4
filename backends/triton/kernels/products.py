"""What kernels that multiply share: the type of their operands, and what follows a product before it is stored."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl

from graphwright.backends.triton.launching import meant, part
from graphwright.backends.triton.status import triton_status
from graphwright.ir.errors import BackendError

# What an epilogue can apply.
ACTIVATIONS = ("", "silu", "gelu", "gelu_tanh", "relu", "tanh")

# Processors of an H100 or H200, where no device says how many it has.
_PROCESSORS = 132


def operand_type(dtype: torch.dtype) -> Any:
    """The type that tensor cores take for values of a dtype.

    The interpreter multiplies the bits of bfloat16 as integers, so there they are multiplied in float32: that gives the
    same products.
    """
    if dtype == torch.bfloat16:
        return tl.float32 if triton_status().interpreted else tl.bfloat16
    return tl.float16 if dtype == torch.float16 else tl.float32


def block_of_group(size: int, *, where: str) -> int:
    """Columns that a kernel multiplies at once where groups of so many share a scale.

    Raises:
        BackendError: groups are no multiple of 32, the least that tensor cores take of 8-bit numbers.
    """
    for block in (128, 64, 32):
        if size % block == 0:
            return block
    raise BackendError(
        f"groups of {size} columns have no kernel", where=where, hint="use multiples of 32, such as 64 or 128"
    )


def processors(device: torch.device) -> int:
    """How many programs run side by side, each on a processor of its own."""
    own = meant(device)
    if own.type != "cuda":
        return _PROCESSORS
    return int(torch.cuda.get_device_properties(own).multi_processor_count)


@part
def tanh(x: tl.tensor) -> tl.tensor:
    """From the exponential, which neither end overflows."""
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@part
def sigmoid(x: tl.tensor) -> tl.tensor:
    return 1.0 / (1.0 + tl.exp(-x))


@part
def activate(x: tl.tensor, ACTIVATION: tl.constexpr) -> tl.tensor:
    """``activation(x)`` of float32; see :func:`graphwright.ir.ops.activation.activate`."""
    if ACTIVATION == "silu":
        x = x * sigmoid(x)
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        x = 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    elif ACTIVATION == "relu":
        x = tl.where(x < 0.0, 0.0, x)  # NaN stays
    elif ACTIVATION == "tanh":
        x = tanh(x)
    return x


@part
def slope(x: tl.tensor, ACTIVATION: tl.constexpr) -> tl.tensor:
    """The derivative of :func:`activate`."""
    if ACTIVATION == "silu":
        s = sigmoid(x)
        x = s * (1.0 + x * (1.0 - s))
    elif ACTIVATION == "gelu":
        x = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif ACTIVATION == "gelu_tanh":
        t = tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))
        x = 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * 0.7978845608028654 * (1.0 + 0.134145 * x * x)
    elif ACTIVATION == "relu":
        x = tl.where(x > 0.0, 1.0, 0.0)
    return x


@part
def add_branch(
    total: tl.tensor,
    n: tl.tensor,
    m: tl.tensor,
    down: tl.tensor,
    up: tl.tensor,
    branch_scale: tl.tensor,
    rank: tl.tensor,
    rows: tl.tensor,
    outputs: tl.tensor,
    RANK: tl.constexpr,
    DOT: tl.constexpr,
) -> tl.tensor:
    """``total + scale · down upᵀ``, ``[rows, outputs]``: a low-rank branch; ``n`` are outputs and ``m`` rows."""
    r = tl.arange(0, RANK)
    at_down = down + m.to(tl.int64)[:, None] * rank + r[None, :]
    left = tl.load(at_down, (m < rows)[:, None] & (r < rank)[None, :], 0.0)
    right = tl.load(up + n[None, :] * rank + r[:, None], (n < outputs)[None, :] & (r < rank)[:, None], 0.0)
    return total + branch_scale * tl.dot(left.to(DOT), right.to(DOT), input_precision="ieee")


@part
def finish(
    total: tl.tensor,
    n: tl.tensor,
    m: tl.tensor,
    inside: tl.tensor,
    bias: tl.tensor,
    factor: tl.tensor,
    residual: tl.tensor,
    factor_stride: tl.tensor,
    residual_stride: tl.tensor,
    ACTIVATION: tl.constexpr,
) -> tl.tensor:
    """``activation(total + bias) * factor + residual``; ``n`` are outputs and ``m`` rows, broadcastable to total."""
    if bias is not None:
        total += tl.load(bias + n + 0 * m, inside, 0.0).to(tl.float32)
    total = activate(total, ACTIVATION)
    if factor is not None:
        total *= tl.load(factor + m.to(tl.int64) * factor_stride + n, inside, 0.0).to(tl.float32)
    if residual is not None:
        total += tl.load(residual + m.to(tl.int64) * residual_stride + n, inside, 0.0).to(tl.float32)
    return total
