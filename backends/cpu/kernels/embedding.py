"""Lookups in tables, of floats or of integers that stand for floats."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import numpy as np
import torch

from graphwright.backends.cpu.kernels.base import Kernel, Lowering, Shape, Site, Step, stored_floats
from graphwright.ir.errors import BackendError
from graphwright.ir.ops.quantization import widened


class _Lookup(Kernel):
    """What both lookups share: ``_dtype`` is what a table's row holds, ``_columns`` how many of them."""

    inputs = ("indices",)
    _dtype: torch.dtype
    _columns: int

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        """The rows ``[*indices, columns]``; without gradients.

        Raises:
            BackendError: the indices are not integers on the CPU, or one is not in the table.
        """
        if indices.dtype != torch.int64:
            if indices.is_floating_point() or indices.dtype == torch.bool:
                raise BackendError(f"takes indices, not {indices.dtype}", where=self.label)
            indices = indices.to(torch.int64)
        result = torch.empty(*indices.shape, self._columns, dtype=self._dtype)
        try:
            self._run(np.ascontiguousarray(indices.numpy()).reshape(-1), result)
        except IndexError as error:
            raise BackendError(str(error), where=self.label) from None
        return result

    def step(self, inputs: Sequence[Shape | None], result: Shape) -> Step | None:
        """Operands: the indices."""
        return Step(self._kernel, (0,)) if self._dtype in (torch.float32, torch.bfloat16) else None

    @abstractmethod
    def _run(self, indices: np.ndarray, result: torch.Tensor) -> None: ...


class Embedding(_Lookup):
    """Rows of a table of any dtype.

    Args:
        weight: ``[rows, columns]``.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        from graphwright.backends.cpu import _native  # not at the top: it may be absent

        self._dtype, self._columns = weight.dtype, weight.shape[1]
        self._kernel = _native.Table(
            weight.detach().contiguous().view(torch.uint8).numpy(), weight.dtype == torch.bfloat16
        )
        self.label = "embedding, rows copied"

    def _run(self, indices: np.ndarray, result: torch.Tensor) -> None:
        # Bytes, because numpy has no bfloat16.
        rows = result.view(torch.uint8).numpy().reshape(len(indices), self._columns * self._dtype.itemsize)
        self._kernel.run(indices, rows, torch.get_num_threads())


class PackedEmbedding(_Lookup):
    """Rows of a table of integers, dequantised.

    Args:
        isa: instruction set of the kernel.
        qweight, scales, zero_points, bits, group_size, embedding_dim: see
            :func:`graphwright.ir.ops.quantization.embedding_nbits`.
    """

    _dtype = torch.float32

    def __init__(
        self,
        isa: str,
        qweight: torch.Tensor,
        scales: torch.Tensor,
        zero_points: torch.Tensor | None,
        bits: int,
        group_size: int,
        embedding_dim: int,
    ) -> None:
        super().__init__()
        from graphwright.backends.cpu import _native  # not at the top: it may be absent

        self._columns = embedding_dim
        described = f"{bits}-bit table"
        if bits in (2, 3):
            described += " stored as 4-bit codes"
            qweight, bits = widened(qweight, bits, symmetric=zero_points is None), 4
        codes, zeros = qweight.contiguous().numpy(), None if zero_points is None else zero_points.contiguous().numpy()
        self._kernel = _native.PackedTable(isa, bits, embedding_dim, group_size, codes, stored_floats(scales), zeros)
        self.label = f"embedding_nbits {self._kernel.isa}, {described}"

    def _run(self, indices: np.ndarray, result: torch.Tensor) -> None:
        self._kernel.run(indices, result.numpy().reshape(len(indices), self._columns), torch.get_num_threads())


def _embedding(site: Site) -> Kernel | str:
    if not site.is_stored("weight"):
        return "its table is computed, not stored"
    return Embedding(site.stored("weight"))


def _embedding_nbits(site: Site) -> Kernel | str:
    if any(
        not site.is_stored(name) for name in ("qweight", "scales", "zero_points") if site.arguments[name] is not None
    ):
        return "its table is computed, not stored"
    if site.value("scales").dtype == torch.float64:
        return "the kernels compute in float32, not in float64"
    table = site.stored("qweight"), site.stored("scales"), site.maybe_stored("zero_points")
    return PackedEmbedding(
        site.isa, *table, *(site.arguments[name] for name in ("bits", "group_size", "embedding_dim"))
    )


LOWERINGS: dict[str, Lowering] = {"aten.embedding": _embedding, "graphwright.embedding_nbits": _embedding_nbits}
