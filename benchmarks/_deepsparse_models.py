"""Quantised ONNX files as DeepSparse runs them in INT8.

What onnxruntime's quantiser writes it does not fuse: weights are dequantised and multiplied in floats, zeros and all.
SparseML, which it was made for, exports integer products: ``QuantizeLinear -> MatMulInteger -> Cast -> Mul``.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def integer_products(source: Path, target: Path) -> int:
    """Write the products of dequantised rows and stored weights as integer products; gives how many there are.

    What is rounded elsewhere is not: it would cost DeepSparse time and save none.

    Args:
        source: ONNX of onnxruntime's ``quantize_static`` in QDQ form, one scale to a tensor.
        target: where the other is written.

    Raises:
        ValueError: there are none, so it is not such a file.
    """
    model = onnx.load(source)
    graph = model.graph
    stored = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
    made_by = {output: node for node in graph.node for output in node.output}
    nodes: list[onnx.NodeProto] = []
    count = 0
    for node in graph.node:
        found = _operands(node, made_by, stored)
        if found is None:
            nodes.append(node)
            continue
        (codes, step, zero), (weight, factor, middle) = found
        name = node.output[0]
        scale = np.asarray(stored[step] * stored[factor], np.float32).reshape(())
        graph.initializer.append(numpy_helper.from_array(scale, f"{name}_rescale"))
        nodes += [
            helper.make_node("MatMulInteger", [codes, weight, zero, middle], [f"{name}_sums"]),
            helper.make_node("Cast", [f"{name}_sums"], [f"{name}_floats"], to=TensorProto.FLOAT),
            helper.make_node("Mul", [f"{name}_floats", f"{name}_rescale"], [name]),
        ]
        count += 1
    if count == 0:
        raise ValueError(f"{source}: no product of a dequantised input and a dequantised weight")
    _take_out_rounding(nodes, made_by)
    del graph.node[:]
    graph.node.extend(_read(nodes, [each.name for each in graph.output]))
    onnx.save(model, target)
    return count


def _operands(
    node: onnx.NodeProto, made_by: dict[str, onnx.NodeProto], stored: dict[str, np.ndarray]
) -> tuple[list[str], list[str]] | None:
    """Codes, scale and zero point of a product's rows and of its stored weight; ``None`` for any other node."""
    if node.op_type != "MatMul":
        return None
    rows, weight = (made_by.get(name) for name in node.input)
    if rows is None or weight is None or {rows.op_type, weight.op_type} != {"DequantizeLinear"}:
        return None
    if weight.input[0] not in stored or rows.input[0] in stored or stored[weight.input[1]].size != 1:
        return None
    return list(rows.input), list(weight.input)


def _take_out_rounding(nodes: list[onnx.NodeProto], made_by: dict[str, onnx.NodeProto]) -> None:
    """Let what reads codes that were dequantised at once read the floats that they were made of."""
    before: dict[str, str] = {}
    for node in nodes:
        rounded = made_by.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if rounded is not None and rounded.op_type == "QuantizeLinear":
            before[node.output[0]] = rounded.input[0]
    for node in nodes:
        for index, name in enumerate(node.input):
            while name in before:
                name = before[name]
            node.input[index] = name


def _read(nodes: list[onnx.NodeProto], outputs: list[str]) -> list[onnx.NodeProto]:
    """Those whose results something reads."""
    wanted, kept = set(outputs), list[onnx.NodeProto]()
    for node in reversed(nodes):
        if wanted.intersection(node.output):
            wanted.update(node.input)
            kept.append(node)
    return kept[::-1]
