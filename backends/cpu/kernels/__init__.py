"""Kernels as modules that stand in a lowered graph: one file per family, each with the table of operators it lowers."""

from graphwright.backends.cpu.kernels.base import Kernel, Lowering, Site
from graphwright.backends.cpu.kernels.byte_linear import LOWERINGS as _BYTE_LINEARS
from graphwright.backends.cpu.kernels.embedding import LOWERINGS as _EMBEDDINGS
from graphwright.backends.cpu.kernels.norms import LOWERINGS as _NORMS
from graphwright.backends.cpu.kernels.pointwise import LOWERINGS as _POINTWISE
from graphwright.backends.cpu.kernels.rotary import LOWERINGS as _ROTARY

__all__ = ["LOWERINGS", "Kernel", "Lowering", "Site"]

LOWERINGS: dict[str, Lowering] = {**_BYTE_LINEARS, **_EMBEDDINGS, **_NORMS, **_POINTWISE, **_ROTARY}
