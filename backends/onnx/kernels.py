"""Which kernels run: the runtime's optimised graph as a table."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from graphwright.backends.onnx.options import ACCURACY_LEVELS
from graphwright.backends.onnx.runtime import open_session
from graphwright.ir.errors import ExportError

# Operators that multiply matrices in float, and in quantised form.
FLOAT_PRODUCTS = frozenset({"MatMul", "Gemm", "FusedMatMul", "FusedGemm", "MatMulBnFusion", "Conv", "FusedConv"})
QUANTIZED_PRODUCTS = frozenset(
    {
        "MatMulNBits",
        "MatMulInteger",
        "MatMulIntegerToFloat",
        "DynamicQuantizeMatMul",
        "QLinearMatMul",
        "QGemm",
        "QAttention",
    }
)
# Attention that appends to its cache.
ATTENTION = "GroupQueryAttention"
# What tells kernels of one operator apart.
_SHOWN = ("bits", "block_size", "accuracy_level")
_SHOWN_OF_ATTENTION = {"do_rotary": 0, "local_window_size": -1, "softcap": 0.0}


@dataclass(frozen=True)
class KernelCount:
    """How often one kernel runs.

    Attributes:
        kernel: operator and what tells its kernels apart: ``MatMulNBits bits=4 block=32 accuracy_level=1``.
        count: nodes in the optimised graph.
        note: what a user should know of it.
    """

    kernel: str
    count: int
    note: str = ""


class KernelTable(tuple[KernelCount, ...]):
    """Kernels by count; prints as a table."""

    def __str__(self) -> str:
        width = max((len(row.kernel) for row in self), default=0)
        lines = [f"{row.count:6d}  {row.kernel:<{width}}  {row.note}".rstrip() for row in self]
        return "\n".join([f"{'count':>6}  kernel", *lines])


def explain(path: str | os.PathLike[str], *, accuracy_level: int | None = None) -> KernelTable:
    """Which kernels onnxruntime runs for an ONNX file, read from its optimised graph.

    Args:
        path: any ONNX file.
        accuracy_level: as the session will be opened with, see :func:`open_session`.

    Raises:
        ExportError: the file does not exist, or onnxruntime does not open it.
    """
    file = Path(path)
    if not file.is_file():
        raise ExportError("there is no such file", where=str(file))
    session = open_session(file, accuracy_level=accuracy_level, keep_optimized=True)
    assert session.optimized is not None
    return kernels_of(session.optimized)


def kernels_of(optimized: onnx.ModelProto) -> KernelTable:
    """The kernels of an optimised graph, subgraphs included."""
    unpacked = unpacked_weights(optimized.graph)
    counts = Counter((label(node), note_of(node, unpacked)) for node in _nodes(optimized.graph))
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return KernelTable(KernelCount(kernel, count, note) for (kernel, note), count in ordered)


def note_of(node: onnx.NodeProto, unpacked: frozenset[str]) -> str:
    """What a user should know of a kernel; ``unpacked`` as :func:`unpacked_weights` gives it."""
    if node.op_type == "MatMulNBits":
        return ACCURACY_LEVELS.get(attribute(node, "accuracy_level", 0), "")
    if node.op_type in FLOAT_PRODUCTS and any(name in unpacked for name in node.input):
        return "quantised weights, unpacked to float on every call"
    return ""


def attribute(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    """An attribute of a node, or a default."""
    for each in node.attribute:
        if each.name == name:
            return onnx.helper.get_attribute_value(each)
    return default


def label(node: onnx.NodeProto) -> str:
    """The operator and what tells its kernels apart."""
    shown = [(key, attribute(node, key)) for key in _SHOWN] if node.op_type.endswith(("NBits", "Quantized")) else []
    if node.op_type == ATTENTION:
        given = [(key, attribute(node, key, plain)) for key, plain in _SHOWN_OF_ATTENTION.items()]
        shown = [(key, value) for key, value in given if value != _SHOWN_OF_ATTENTION[key]]
    words = [f"{key.removesuffix('_size')}={value}" for key, value in shown if value is not None]
    return " ".join([node.op_type, *words])


def unpacked_weights(graph: onnx.GraphProto) -> frozenset[str]:
    """Values that are stored weights unpacked by DequantizeLinear, also behind a Transpose or Reshape."""
    stored = {each.name for each in graph.initializer}
    found: set[str] = set()
    for node in graph.node:
        from_stored = node.op_type == "DequantizeLinear" and node.input[0] in stored
        passed_on = node.op_type in ("Transpose", "Reshape", "Cast") and node.input[0] in found
        if from_stored or passed_on:
            found.update(node.output)
    return frozenset(found)


def _nodes(graph: onnx.GraphProto) -> Iterable[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for each in node.attribute:
            if each.type == onnx.AttributeProto.GRAPH:
                yield from _nodes(each.g)
