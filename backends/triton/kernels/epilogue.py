"""What a linear's kernel does before it stores its result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from graphwright.backends.triton.kernels.products import ACTIVATIONS
from graphwright.ir.errors import BackendError

# The highest rank of a branch whose factors fit the registers beside the sums.
WIDEST_BRANCH = 64


@dataclass(frozen=True)
class Epilogue:
    """``activation(y + bias + scale · down upᵀ) * factor + residual``; what is ``None`` is left out.

    Attributes:
        bias: ``[out]``.
        activation: one of :data:`graphwright.backends.triton.kernels.products.ACTIVATIONS`.
        factor: of the result's shape, or ``[out]``.
        residual: likewise.
        down: the low-rank branch's ``x Aᵀ``, ``[..., r]`` of x's dtype.
        up: ``[out, r]``, r at most :data:`WIDEST_BRANCH`.
        scale: of the branch.
    """

    bias: torch.Tensor | None = None
    activation: str = ""
    factor: torch.Tensor | None = None
    residual: torch.Tensor | None = None
    down: torch.Tensor | None = None
    up: torch.Tensor | None = None
    scale: float = 1.0

    @property
    def is_long(self) -> bool:
        """Whether it reads more than a bias, and so needs registers beside those of the sums."""
        return any(each is not None for each in (self.factor, self.residual, self.up))

    def check(self, rows: int, outputs: int) -> None:
        """Check every part against the result ``[rows, outputs]``.

        Raises:
            BackendError: one does not fit.
        """
        if self.activation not in ACTIVATIONS:
            raise BackendError(f"there is no activation {self.activation!r}", where="epilogue of a linear")
        if (self.down is None) != (self.up is None):
            raise BackendError("a low-rank branch has two factors", where="epilogue of a linear")
        rank = 0 if self.up is None else self.up.shape[1]
        if rank > WIDEST_BRANCH:
            raise BackendError(
                f"a low-rank branch of rank {rank} does not fit the registers",
                where="epilogue of a linear",
                hint=f"ranks up to {WIDEST_BRANCH} do; add wider ones as linears of their own",
            )
        sizes = {"bias": {outputs}, "factor": {outputs, rows * outputs}, "residual": {outputs, rows * outputs}}
        for name, wanted in {**sizes, "down": {rows * rank}, "up": {outputs * rank}}.items():
            value = getattr(self, name)
            if value is not None and value.numel() not in wanted:
                raise BackendError(
                    f"{name} {list(value.shape)} does not fit a result of {rows} rows and {outputs} outputs",
                    where="epilogue of a linear",
                )

    def stored(self, outputs: int) -> dict[str, Any]:
        """The kernel's arguments for all but the low-rank branch: contiguous tensors and row strides."""
        factor, residual = (None if each is None else each.contiguous() for each in (self.factor, self.residual))
        strides = [0 if each is None or each.dim() == 1 else outputs for each in (factor, residual)]
        return {
            "bias": self.bias,
            "factor": factor,
            "residual": residual,
            "factor_stride": strides[0],
            "residual_stride": strides[1],
            "ACTIVATION": self.activation,
        }

    def branch(self) -> dict[str, Any]:
        """The kernel's arguments for the low-rank branch."""
        rank = 0 if self.up is None else self.up.shape[1]
        down, up = (None if each is None else each.contiguous() for each in (self.down, self.up))
        padded = max(16, 1 << max(0, rank - 1).bit_length())
        return {"down": down, "up": up, "branch_scale": float(self.scale), "rank": rank, "RANK": padded}
