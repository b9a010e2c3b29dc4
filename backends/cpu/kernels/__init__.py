"""Kernels as modules that stand in a lowered graph: one file per family, each with the table of operators it lowers."""

from graphwright.backends.cpu.kernels.base import Kernel, Lowering, Site
from graphwright.backends.cpu.kernels.byte_linear import LOWERINGS as _BYTE_LINEARS
from graphwright.backends.cpu.kernels.float_linear import LOWERINGS as _FLOAT_LINEARS

__all__ = ["LOWERINGS", "Kernel", "Lowering", "Site"]

LOWERINGS: dict[str, Lowering] = {**_BYTE_LINEARS, **_FLOAT_LINEARS}
