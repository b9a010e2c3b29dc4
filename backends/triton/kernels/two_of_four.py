"""Linears with weights of which two of every four are zeros, through torch's semi-structured tensors."""

from __future__ import annotations

from typing import Any

import torch

from graphwright.backends.triton.launching import apply
from graphwright.ir.errors import BackendError


class _TwoOfFour(torch.autograd.Function):
    """torch's product with a semi-structured weight, with the gradients of input and bias."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: Any, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.weight = weight
        return torch.nn.functional.linear(x.contiguous(), weight, bias)  # torch takes a view of it

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grads
        # The hardware skips zeros along the inputs only, so the gradient takes the weight densely.
        of_x = grad @ ctx.weight.to_dense() if ctx.needs_input_grad[0] else None
        of_bias = grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        return of_x, None, of_bias


def linear_two_of_four(x: torch.Tensor, weight: Any, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``y = x Wᵀ + b`` with what :func:`two_of_four` gives (Mishra et al. 2021, "Accelerating sparse deep neural
    networks", sec. 3), by torch's kernels.

    Args:
        x: ``[..., in]``, of the weight's dtype, on its GPU.
        weight: semi-structured, ``[out, in]``.
        bias: ``[out]`` or ``None``.

    Returns:
        ``[..., out]``; gradients flow to x and the bias. Zeros are skipped: infinity of x meets stored weights only.
    """
    result: torch.Tensor = apply(_TwoOfFour, x, weight, bias)
    return result


def refusal_of_two_of_four(weight: torch.Tensor) -> str | None:
    """Why torch cannot store a weight 2:4, or ``None`` where it can."""
    if weight.device.type != "cuda":
        return f"needs a weight on a GPU, not on {weight.device}"
    if weight.dtype not in (torch.float16, torch.bfloat16):
        return f"a weight {weight.dtype} cannot be stored so; float16 and bfloat16 can"
    if weight.shape[0] % 64 or weight.shape[1] % 64:
        return f"a weight {list(weight.shape)} cannot be stored so; multiples of 64 can"
    return None if is_two_of_four(weight) else "has groups of four with more than two weights"


def is_two_of_four(weight: torch.Tensor) -> bool:
    """Whether at most two of every four neighbours in a row are not 0."""
    if weight.shape[1] % 4:
        return False
    return bool((weight.unflatten(1, (-1, 4)).count_nonzero(-1) <= 2).all())


def two_of_four(weight: torch.Tensor) -> Any:
    """A weight of which at most two of every four neighbours are not 0, as torch's semi-structured tensor.

    Args:
        weight: ``[out, in]`` on a GPU, float16 or bfloat16; multiples of 64.

    Raises:
        BackendError: it is not so, or lies on the CPU.
    """
    if (reason := refusal_of_two_of_four(weight)) is not None:
        raise BackendError(reason, where="2:4 sparse linear", hint="prune it to 2:4, in half precision, on the GPU")
    from torch.sparse import to_sparse_semi_structured

    return to_sparse_semi_structured(weight)
