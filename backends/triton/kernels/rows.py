"""Tensors as rows, and how many of them a program takes."""

from __future__ import annotations

import torch

from graphwright.backends.triton.configurations import Config
from graphwright.backends.triton.launching import power_of_two

# The widest row that one program holds in its registers.
WIDEST = 65536


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """``[rows, d]`` of any row stride, neighbours in a row beside each other; a copy only where no view is that."""
    rows = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty((x.shape[:-1].numel(), x.shape[-1]))
    return rows if rows.stride(1) == 1 or rows.shape[1] <= 1 else rows.contiguous()


def row_config(columns: int) -> Config:
    """Whole rows to a program: several where they are short, more warps where they are long."""
    block = power_of_two(columns)
    rows = max(1, min(16, 1024 // block))
    return Config({"ROWS": rows, "BLOCK": block}, warps=max(2, min(16, rows * block // 512)), stages=1)
