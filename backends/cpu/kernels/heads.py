"""Attention that reads heads where linears wrote them, and writes them where the next linear reads them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from graphwright.backends.cpu.kernels.attention import Attention, rows
from graphwright.backends.cpu.kernels.base import Kernel
from graphwright.ir.errors import BackendError

# Where heads lie in a tensor [B, S, features]: the first feature, how many heads, the head dim.
Place = tuple[int, int, int]


class HeadsAttention(Kernel):
    """Attention between linears: splitting their outputs into heads and joining the result are views within the kernel.

    Args:
        attention: what it computes.
        places: of query, key and value; ``None`` for one that comes as ``[B, H, S, D]``.
        joins: give ``[B, S, Hq · Dv]``, not ``[B, Hq, S, Dv]``.
    """

    inputs = ("query", "key", "value", "key_mask", "bias")

    def __init__(
        self,
        isa: str,
        scale: float,
        causal: bool,
        window: int,
        places: tuple[Place | None, ...],
        joins: bool,
    ) -> None:
        super().__init__()
        self.attention = Attention(isa, scale, causal, window)
        self.places, self.joins = tuple(places), joins
        self.label = self.attention.label

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_mask: torch.Tensor | None,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """The operator on float32 tensors.

        Raises:
            BackendError: shapes or dtypes do not fit, or a tensor is not on the CPU.
        """
        sources = (query, key, value)
        if any(x.dtype != torch.float32 or not x.is_cpu for x in sources):
            raise BackendError(f"takes float32 CPU tensors, not {[x.dtype for x in sources]}", where="attention kernel")
        try:
            q, k, v = (_heads(x, place) for x, place in zip(sources, self.places, strict=True))
            result = np.empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3]), np.float32)
            self.attention.compute(q, k, v, result.transpose(0, 2, 1, 3), key_mask, bias)
        except ValueError as error:
            shapes = ", ".join(str(list(x.shape)) for x in sources)
            raise BackendError(f"{error} (query, key and value are {shapes})", where="attention kernel") from None
        if self.joins:
            return torch.from_numpy(result.reshape(*result.shape[:2], result.shape[2] * result.shape[3]))
        return torch.from_numpy(result.transpose(0, 2, 1, 3))


def _heads(x: torch.Tensor, place: Place | None) -> npt.NDArray[np.float32]:
    values = rows(x)
    if place is None:
        return values
    first, heads, width = place
    part = values[:, :, first : first + heads * width]
    split: npt.NDArray[np.float32] = part.reshape(*part.shape[:2], heads, width).transpose(0, 2, 1, 3)
    return split
