"""Kernels as modules that stand in a lowered graph: one file per family, each with the table of operators it lowers."""

from typing import Any

from graphwright.backends.cpu.kernels.base import Kernel, Lowering, Site
from graphwright.backends.cpu.kernels.byte_linear import LOWERINGS as _BYTE_LINEARS
from graphwright.backends.cpu.kernels.byte_linear import ByteLinear
from graphwright.backends.cpu.kernels.byte_packing import PackedLinear

__all__ = ["KERNELS", "LOWERINGS", "PACKED", "Kernel", "Lowering", "Site"]

LOWERINGS: dict[str, Lowering] = {**_BYTE_LINEARS}

# By name, for packed files: kernels, and the dataclasses of packed operands that they take.
KERNELS: dict[str, type[Kernel]] = {kernel.__name__: kernel for kernel in (ByteLinear,)}
PACKED: dict[str, type[Any]] = {packed.__name__: packed for packed in (PackedLinear,)}
