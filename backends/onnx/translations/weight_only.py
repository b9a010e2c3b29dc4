"""Linears on quantised weights and float activations."""

from __future__ import annotations

import onnx_ir as ir
import torch
from torch import fx

from graphwright.backends.onnx import encodings
from graphwright.backends.onnx.graph import CONTRIB
from graphwright.backends.onnx.lowering import Lowering
from graphwright.ir.names import op_name
from graphwright.ir.ops.quantization import widened

KERNEL = "MatMulNBits"
_KINDS: dict[int, torch.dtype | ir.DataType] = {4: ir.DataType.UINT4, 8: torch.uint8}
# Widths that onnxruntime multiplies. It has no kernel for 3 bits, and fuses no DequantizeLinear of 2.
_WIDTHS, _PORTABLE_WIDTHS = (2, 4, 8), (4, 8)


def linear_nbits(
    lower: Lowering,
    node: fx.Node,
    x: fx.Node,
    qweight: fx.Node,
    scales: fx.Node,
    zero_points: fx.Node | None,
    bias: fx.Node | None,
    bits: int,
    group_size: int,
) -> None:
    """``MatMulNBits`` for the runtime; ``DequantizeLinear(axis=0) -> MatMul`` in portable files.

    The portable spelling stands on weights stored as ``[K, N]``, which onnxruntime fuses to ``MatMulNBits``; weights
    stored as ``[N, K]`` with a Transpose, or fed to a Gemm, it would unpack on every call. Codes of a width that it has
    no kernel for are stored in 4 bits, which changes no weight.

    Raises:
        ExportError: the group size cannot be written in blocks that have a kernel.
    """
    columns = lower.shape(x)[-1]
    if not isinstance(columns, int):
        raise lower.refuse(node, "the input features vary from call to call")
    block = encodings.block_size(group_size, columns)
    if block is None:
        raise lower.refuse(
            node,
            f"onnxruntime has no kernel for groups of {group_size}: it would run this linear in float",
            "quantise with a group size that is a multiple of 16, or per channel",
        )
    for each in (qweight, scales, zero_points):
        if each is not None and each.op != "get_attr":
            raise lower.refuse(node, "quantised weights must be stored, here they are computed")
    if zero_points is not None and lower.program.tensor(zero_points).is_floating_point():
        raise lower.refuse(
            node,
            "onnxruntime has no kernel for zero points between codes: it would run this linear in float",
            "quantise without float_zero_points for ONNX",
        )
    widths = _WIDTHS if lower.options.has_contrib and not _is_looked_up(lower, qweight) else _PORTABLE_WIDTHS
    stored = qweight, scales, zero_points
    multiply(lower, node, x, StoredWeights(lower, stored, bits, group_size, columns, block, widths), bias)


def multiply(lower: Lowering, node: fx.Node, x: fx.Node, weights: StoredWeights, bias: fx.Node | None) -> None:
    """The product with packed weights in the spelling of the export's mode."""
    emit = _matmul_nbits if lower.options.has_contrib else _dequantize_matmul
    results = emit(lower, node, x, weights, bias)
    lower.set_rows(node, results[-1])
    lower.expect(node, KERNEL, results)


def _is_looked_up(lower: Lowering, qweight: fx.Node) -> bool:
    """Whether a table shares the codes, whose operator takes no others than 4 and 8 bits."""
    same = [node for node in lower.program.nodes if node.op == "get_attr" and node.target == qweight.target]
    return any(op_name(user) == "graphwright.embedding_nbits" for node in same for user in node.users)


def linear_codebook(
    lower: Lowering,
    node: fx.Node,
    x: fx.Node,
    qweight: fx.Node,
    scales: fx.Node,
    bias: fx.Node | None,
    format: str,
    group_size: int,
) -> None:
    """Nothing: whatever spells it, onnxruntime's CPU kernels make the weights floats and multiply those.

    Raises:
        ExportError: always.
    """
    raise lower.refuse(
        node,
        f"onnxruntime has no kernel for {format} weights: it would run this linear in float",
        "quantise to integers for ONNX (dtype='int'), or run on target='cpu'",
    )


class StoredWeights:
    """The stored tensors of a quantised linear or table, and how they are blocked.

    Attributes:
        bits: of a code in the file; 4 where the stored ones have a width that is not among ``widths``.
    """

    def __init__(
        self,
        lower: Lowering,
        stored: tuple[fx.Node, fx.Node, fx.Node | None],
        bits: int,
        group_size: int,
        columns: int,
        block: int,
        widths: tuple[int, ...] = _PORTABLE_WIDTHS,
    ) -> None:
        names = [str(each.target) if each is not None else "" for each in stored]
        tensors = [lower.program.tensor(each).detach() if each is not None else None for each in stored]
        self._hold(names, tensors, bits, group_size, columns, block, widths)

    @classmethod
    def of(
        cls,
        names: list[str],
        tensors: list[torch.Tensor | None],
        bits: int,
        group_size: int,
        columns: int,
        block: int,
        widths: tuple[int, ...] = _PORTABLE_WIDTHS,
    ) -> StoredWeights:
        """Of codes, scales and zero points (or ``None``) that a program stores in another form; arguments as above."""
        made = cls.__new__(cls)
        made._hold(names, tensors, bits, group_size, columns, block, widths)
        return made

    def _hold(
        self,
        names: list[str],
        tensors: list[torch.Tensor | None],
        bits: int,
        group_size: int,
        columns: int,
        block: int,
        widths: tuple[int, ...],
    ) -> None:
        stored, scales, self.zero_points = tensors
        assert stored is not None
        assert scales is not None
        self.names, self._stored, self.scales, self._bits = names, stored, scales, bits
        self.bits = bits if bits in widths else 4
        self.group = group_size
        self.columns = columns
        self.rows = int(self._stored.shape[0])
        self.block = block
        self.blocks = -(-columns // block)

    @property
    def qweight(self) -> torch.Tensor:
        """``[N, groups, group bytes]``, made anew where the width is another than the stored one's."""
        if self.bits == self._bits:
            return self._stored
        return widened(self._stored, self._bits, symmetric=self.zero_points is None)

    def blocked(self) -> torch.Tensor:
        """``[N, blocks, block bytes]``."""
        return encodings.blocked(self.qweight, self.bits, self.group, self.columns, self.block)

    def is_blocked(self) -> bool:
        """Whether the codes can be written as they are stored."""
        return self.bits == self._bits and self.block == self.group and self._stored.shape[1] == self.blocks

    def per_block(self, values: torch.Tensor) -> torch.Tensor:
        """``[N, blocks]``."""
        return encodings.per_block(values, self.group, self.columns, self.block)

    def values(self, lower: Lowering, dtype: torch.dtype) -> tuple[ir.Value, ir.Value]:
        """Initialisers of the packed weights ``[N, blocks, block bytes]`` and, as dtype, the scales ``[N, blocks]``.

        A linear and a table that share their storage get the same ones.
        """
        graph = lower.graph
        if self.is_blocked():
            packed = graph.weight(self.names[0], self._stored)
            scales = graph.weight(self.names[1], self.scales)
        else:
            shape = (self.rows, self.blocks, self.block * self.bits // 8)
            packed = graph.derived(f"{self.names[0]}.blocked", torch.uint8, shape, self.blocked)
            scales = graph.derived(
                f"{self.names[1]}.blocked",
                self.scales.dtype,
                (self.rows, self.blocks),
                lambda: self.per_block(self.scales),
            )
        # Scales may be stored in half precision; the runtime folds the cast when it opens the file.
        return packed, lower.cast(scales, self.scales.dtype, dtype)


def _matmul_nbits(
    lower: Lowering, node: fx.Node, x: fx.Node, weights: StoredWeights, bias: fx.Node | None
) -> list[ir.Value]:
    graph, names = lower.graph, weights.names
    packed, scales = weights.values(lower, lower.dtype(node))
    zero_points = None
    if weights.zero_points is not None:
        points = weights.zero_points
        width = -(-weights.blocks * weights.bits // 8)
        zero_points = graph.derived(
            f"{names[2]}.packed",
            torch.uint8,
            (weights.rows, width),
            lambda: encodings.packed_zero_points(weights.per_block(points), weights.bits),
        )
    value = graph.call(
        KERNEL,
        lower.rows(x),
        packed,
        scales,
        zero_points,
        None,
        lower.tensor(bias, lower.dtype(node)) if bias is not None else None,
        domain=CONTRIB,
        K=weights.columns,
        N=weights.rows,
        bits=weights.bits,
        block_size=weights.block,
        accuracy_level=lower.options.accuracy_level,
    )
    return [value]


def _dequantize_matmul(
    lower: Lowering, node: fx.Node, x: fx.Node, weights: StoredWeights, bias: fx.Node | None
) -> list[ir.Value]:
    graph, names, kind = lower.graph, weights.names, _KINDS[weights.bits]
    shape = (weights.columns, weights.rows)
    packed = graph.derived(
        f"{names[0]}.transposed",
        kind,
        shape,
        lambda: encodings.pack_flat(
            encodings.unpack(weights.qweight, weights.bits)[:, : weights.columns].t().contiguous(), weights.bits
        ),
    )
    scales = graph.derived(
        f"{names[1]}.transposed",
        weights.scales.dtype,
        (weights.blocks, weights.rows),
        lambda: weights.per_block(weights.scales).t(),
    )
    scales = lower.cast(scales, weights.scales.dtype, lower.dtype(node))

    def points() -> torch.Tensor:
        if weights.zero_points is None:
            middle = torch.full((weights.blocks, weights.rows), 1 << (weights.bits - 1), dtype=torch.uint8)
            return encodings.pack_flat(middle, weights.bits)
        return encodings.pack_flat(weights.per_block(weights.zero_points).t().contiguous(), weights.bits)

    name = f"{names[2]}.transposed" if names[2] else f"{names[0]}.zero_points"
    zero_points = graph.derived(name, kind, (weights.blocks, weights.rows), points)
    weight = graph.call(
        "DequantizeLinear", packed, scales, zero_points, axis=0, block_size=weights.block, output=f"{names[0]}.float"
    )
    product = graph.call("MatMul", lower.rows(x), weight)
    if bias is None:
        return [product]
    return [product, graph.call("Add", product, lower.tensor(bias, lower.dtype(node)))]
