"""Linears of a program on sparse weights: in the form whose kernel is fastest for the zeros they have."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import torch

from graphwright.backends.triton.kernels.epilogue import Epilogue
from graphwright.backends.triton.kernels.nbits_weight import refusal, repack
from graphwright.backends.triton.kernels.sparse_linear import (
    BLOCKS,
    BlockWeight,
    density_in_blocks,
    fused_linear_blocks,
    linear_blocks,
)
from graphwright.backends.triton.kernels.two_of_four import (
    linear_two_of_four,
    refusal_of_two_of_four,
    two_of_four,
)
from graphwright.backends.triton.nodes.base import LinearKernel, NodeKernel, Site, wants_gradient
from graphwright.backends.triton.nodes.epilogues import branch_in_torch, epilogue_in_torch
from graphwright.backends.triton.nodes.linears import NbitsLinear
from graphwright.ir import ops
from graphwright.ir.ops.quantization import pack
from graphwright.ir.ops.sparse import bits_of, decompress, dense_codes

# The share of blocks up to which skipping the others pays: blocks fill the tensor cores less well than a dense tile.
# Not measured yet: it was written without a GPU.
MOST_BLOCKS = 0.5

_STORED = ("mask", "values", "row_offsets", "scales", "zero_points")


@dataclass(frozen=True)
class Stored:
    """The weight as the program has it, where it trains.

    Attributes:
        operands: mask, values and row offsets; the values are the program's own.
        version: of the values, when the kernel's form was made of them.
    """

    operands: tuple[torch.Tensor, ...]
    version: int


class SparseLinear(LinearKernel, ABC):
    """``linear_sparse`` on floats.

    Args:
        weight: ``[out, in]``, dense.
        stored: the weight as the program has it; ``None`` where it does not train, and need not be kept.
    """

    def __init__(self, weight: torch.Tensor, stored: Stored | None) -> None:
        super().__init__()
        self._stored = stored
        self.lay_out(weight)

    @abstractmethod
    def lay_out(self, weight: torch.Tensor) -> None:
        """Take a dense weight in the kernel's form."""

    @abstractmethod
    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """``x Wᵀ + b``, gradients for x and the bias."""

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None = None, *rest: Any) -> torch.Tensor:
        """As every linear; before it, what training has changed is laid out again."""
        if self._stored is not None:
            mask, values, offsets = self._stored.operands
            if values._version != self._stored.version:
                self.lay_out(_dense(mask, values.detach(), offsets, x.shape[-1]))
                self._stored = replace(self._stored, version=values._version)
            if wants_gradient(values):
                y = self.with_gradients(x, bias)
                down, up, factor, residual = rest
                return epilogue_in_torch(
                    branch_in_torch(y, down, up, self.branch_scale), self.activation, factor, residual
                )
        return super().forward(x, bias, *rest)

    def with_gradients(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """By the kernel; by the reference where the weight wants one."""
        if self._stored is not None and wants_gradient(self._stored.operands[1]):
            target = ops.get("linear_sparse").target
            result: torch.Tensor = target(x, *self._stored.operands, None, None, bias, "float", 0)
            return result
        return self.product(x, bias)


class BlockLinear(SparseLinear):
    """A weight whose zeros fill blocks."""

    def __init__(self, weight: torch.Tensor, stored: Stored | None, size: int) -> None:
        self.size = size
        super().__init__(weight, stored)

    def lay_out(self, weight: torch.Tensor) -> None:
        """As blocks."""
        self.weight = BlockWeight.of(weight, self.size)
        self.label = f"linear_blocks {self.size}x{self.size}, {self.weight.density:.0%} of them stored"

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """By the kernel, as the gradient of the input."""
        return linear_blocks(x, self.weight, bias)

    def fused(self, x: torch.Tensor, epilogue: Epilogue) -> torch.Tensor:
        """One kernel, after one that looks for what is not finite."""
        return fused_linear_blocks(x, self.weight, epilogue)


class TorchLinear(SparseLinear):
    """By torch's kernels, with what follows in steps."""

    runner = "torch"

    def fused(self, x: torch.Tensor, epilogue: Epilogue) -> torch.Tensor:
        """In steps."""
        y = branch_in_torch(self.product(x, epilogue.bias), epilogue.down, epilogue.up, epilogue.scale)
        return epilogue_in_torch(y, epilogue.activation, epilogue.factor, epilogue.residual)


class TwoOfFour(TorchLinear):
    """A weight of which two of every four are zeros."""

    label = "semi-structured 2:4 linear"

    def lay_out(self, weight: torch.Tensor) -> None:
        """As torch's tensor."""
        self.weight = two_of_four(weight)

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """By torch, for sparse tensor cores."""
        return linear_two_of_four(x, self.weight, bias)


class Dense(TorchLinear):
    """A weight whose zeros no kernel can skip."""

    def __init__(self, weight: torch.Tensor, stored: Stored | None, why: str) -> None:
        self.label = f"dense linear ({why})"
        super().__init__(weight, stored)

    def lay_out(self, weight: torch.Tensor) -> None:
        """As it is."""
        self.weight = weight

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """By torch."""
        return torch.nn.functional.linear(x, self.weight, bias)


def lower_sparse(site: Site) -> NodeKernel | str:
    """``graphwright.linear_sparse``: by blocks or 2:4 where the zeros lie so, else by the dense kernel."""
    if not all(site.is_stored(name) for name in _STORED):
        return "its weight is computed"
    if (reason := site.unlike("x")) is not None:
        return reason
    if site.arguments["format"] != "float":
        return _codes(site)
    x, own = site.value("x"), site.program.tensor(site.arguments["values"])
    mask, values, offsets = (site.stored(name) for name in _STORED[:3])
    if values.dtype != x.dtype:
        return f"its weight is {values.dtype}, its input {x.dtype}"
    # Copies on another device do not train.
    trains = own.requires_grad and own.device.type == site.device.type
    stored = Stored((mask, own, offsets), own._version) if trains else None
    weight = _dense(mask, values, offsets, int(x.shape[-1]))
    shares = {size: density_in_blocks(weight, size) for size in BLOCKS}
    # The larger blocks are, the more of a tile they fill: the largest that leave out nearly as many weights.
    best = min(shares.values())
    size = max(size for size, share in shares.items() if share <= best + 0.05)
    if shares[size] <= MOST_BLOCKS:
        return BlockLinear(weight, stored, size)
    if (objection := refusal_of_two_of_four(weight)) is None:
        return TwoOfFour(weight, stored)
    return Dense(weight, stored, f"blocks of {size} store {shares[size]:.0%}; 2:4 {objection}")


def _dense(mask: torch.Tensor, values: torch.Tensor, offsets: torch.Tensor, columns: int) -> torch.Tensor:
    return decompress(mask, values, offsets, None, None, "float", 0, columns, values.dtype)


def _codes(site: Site) -> NodeKernel | str:
    """The dense kernel of the same codes: reading them takes hardly more bytes than codes and mask."""
    format, group, columns = site.arguments["format"], site.arguments["group_size"], int(site.value("x").shape[-1])
    mask, values, offsets = (site.stored(name) for name in _STORED[:3])
    scales, zeros, bits = site.stored("scales"), site.maybe_stored("zero_points"), bits_of(format)
    if (reason := refusal(bits, group, zeros)) is not None:
        return reason
    codes = dense_codes(mask, values, offsets, zeros, format, group, columns)
    made = NbitsLinear(repack(pack(codes, bits, group, zeros), scales, zeros, bits, group, columns))
    made.label += ", zeros stored as codes"
    return made
