"""From a Program to an ONNX model in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from graphwright.backends.onnx.decoder import DecoderLowering
from graphwright.backends.onnx.graph import CONTRIB
from graphwright.backends.onnx.lowering import Lowering, QuantizedLinear
from graphwright.backends.onnx.options import ExportOptions
from graphwright.ir.decoder import DecoderLayout
from graphwright.ir.program import Program

# IR version by opset: the oldest that allows it, so that older runtimes take the file.
_IR_VERSIONS = {21: 10, 22: 10, 23: 11, 24: 12, 25: 12, 26: 13}


@dataclass(frozen=True)
class BuiltModel:
    """An ONNX model, not yet written.

    Attributes:
        model: the model; its initialisers reference the program's weights.
        quantized: the linears that must run on quantised weights.
        input_names: graph inputs in the program's order.
        output_names: graph outputs in the program's order.
        decoder: its layout where the program is a decoding step; inputs and outputs are those of
            :mod:`graphwright.backends.onnx.decoder` then.
    """

    model: ir.Model
    quantized: tuple[QuantizedLinear, ...]
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    decoder: DecoderLayout | None = None

    @property
    def weight_bytes(self) -> int:
        """Bytes of all initialisers."""
        return sum(
            value.const_value.nbytes
            for value in self.model.graph.initializers.values()
            if value.const_value is not None
        )


def build(program: Program, options: ExportOptions) -> BuiltModel:
    """Translate a program; nothing is written and no weight is copied.

    Raises:
        ExportError: the program holds something that has no ONNX translation; names operator and module path.
    """
    decoder = DecoderLayout.find(program)
    lowering = Lowering(program, options) if decoder is None else DecoderLowering(program, options, decoder)
    outputs = lowering.run(_output_names(program))
    nodes = _live(lowering.graph.nodes, outputs)
    used = {value for node in nodes for value in node.inputs if value is not None} | set(outputs)
    initializers = [value for value in lowering.graph.initializers.values() if value in used]
    opsets = {"": options.opset}
    if any(node.domain == CONTRIB for node in nodes):
        opsets[CONTRIB] = 1
    graph = ir.Graph(
        lowering.inputs, outputs, nodes=nodes, initializers=initializers, opset_imports=opsets, name=program.title
    )
    model = ir.Model(graph, ir_version=_IR_VERSIONS[options.opset], producer_name="graphwright")
    live = {node.name for node in nodes}
    quantized = tuple(
        linear
        for linear in lowering.quantized
        if any((producer := value.producer()) is not None and producer.name in live for value in linear.values)
    )
    return BuiltModel(
        model,
        quantized,
        tuple(str(value.name) for value in lowering.inputs),
        tuple(str(value.name) for value in outputs),
        decoder,
    )


def _output_names(program: Program) -> list[str]:
    """Names of the program's outputs, told apart from its inputs and each other."""
    taken = {str(node.target) for node in program.inputs}
    names: list[str] = []
    for name in program.signature.output_names():
        while name in taken:
            name = f"{name}_output"
        taken.add(name)
        names.append(name)
    return names


def _live(nodes: Sequence[ir.Node], outputs: Sequence[ir.Value]) -> list[ir.Node]:
    """The nodes whose results somebody reads."""
    needed = set(outputs)
    kept: list[ir.Node] = []
    for node in reversed(nodes):
        if any(value in needed for value in node.outputs):
            kept.append(node)
            needed.update(value for value in node.inputs if value is not None)
    return kept[::-1]
