"""Which operators work on each row of features by itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx

from graphwright.ir.arguments import argument
from graphwright.ir.names import op_name
from graphwright.ir.program import Program
from graphwright.ir.rewriter import Rewriter
from graphwright.ir.types import TensorType

# Operators on the features of each row by itself -> the operand that brings the rows; the others are weights.
_ROW_WISE: dict[str, str] = {
    "aten.linear": "input",
    "aten.layer_norm": "input",
    "aten.rms_norm": "input",
    "graphwright.kron_linear": "x",
    "graphwright.linear_codebook": "x",
    "graphwright.linear_fp8_dynamic": "x",
    "graphwright.linear_int8_dynamic": "x",
    "graphwright.linear_int8_static": "x",
    "graphwright.linear_nbits": "x",
    "graphwright.linear_nbits_dynamic": "x",
    "graphwright.linear_outliers": "x",
    "graphwright.linear_sparse": "x",
    "graphwright.linear_sparse_dynamic": "x",
    "graphwright.linear_sparse_static": "x",
    "graphwright.rms_norm": "x",
}

# Operators that cut features apart or put them together, and the axis they do it along.
_ALONG: dict[str, str] = {
    "aten.cat": "dim",
    "aten.chunk": "dim",
    "aten.index_select": "dim",
    "aten.slice.Tensor": "dim",
    "aten.softmax.int": "dim",
    "aten.split.Tensor": "dim",
    "aten.split_with_sizes": "dim",
}

_ELEMENTWISE = frozenset(
    {
        "aten.add.Scalar",
        "aten.add.Tensor",
        "aten.clamp",
        "aten.div.Scalar",
        "aten.div.Tensor",
        "aten.elu",
        "aten.exp",
        "aten.gelu",
        "aten.mul.Scalar",
        "aten.mul.Tensor",
        "aten.neg",
        "aten.pow.Tensor_Scalar",
        "aten.relu",
        "aten.sigmoid",
        "aten.silu",
        "aten.sub.Tensor",
        "aten.tanh",
        "aten.to.dtype",
        "graphwright.gated_activation",
    }
)


def operands_by_row(program: Program, node: fx.Node, axes: int) -> list[fx.Node] | str:
    """The operands of which the node reads a row for the same row of its own, or why it cannot be told.

    Args:
        program: the program.
        node: a node of it.
        axes: how many axes say which row it is; one more holds the features.
    """
    name = op_name(node)
    if name == "py.getitem":
        source = node.args[0]
        assert isinstance(source, fx.Node)
        return [source]
    if name in _ROW_WISE:
        source = argument(node, _ROW_WISE[name])
        if name in ("aten.layer_norm", "aten.rms_norm") and len(argument(node, "normalized_shape")) != 1:
            return f"{name} normalises over more than the features"
        return [source] if is_rows(program, source, axes) else f"%{source.name} is not rows of features"
    if name in _ALONG:
        sources = node.all_input_nodes if name != "aten.index_select" else [argument(node, "self")]
        if argument(node, _ALONG[name]) not in (axes, -1):
            return f"{name} is along the rows"
        bad = next((source for source in sources if not is_rows(program, source, axes)), None)
        return list(sources) if bad is None else f"%{bad.name} is not rows of features"
    if name not in _ELEMENTWISE:
        return f"{name} is none of the known operators on each row by itself"
    if not is_rows(program, node, axes):
        return f"%{node.name} is not rows of features"
    found: list[fx.Node] = []
    for source in node.all_input_nodes:
        kind = program.type_of(source)
        if is_rows(program, source, axes) and _leading(program, source, axes) == _leading(program, node, axes):
            found.append(source)
        elif not isinstance(kind, TensorType) or any(size != 1 for size in kind.shape[:-1]):
            return f"%{source.name} is {kind}, broadcast along the rows"
    return found


def is_rows(program: Program, node: fx.Node, axes: int) -> bool:
    """Whether a value is rows of features: the row's axes, then one of a known number of features."""
    kind = program.type_of(node)
    return isinstance(kind, TensorType) and len(kind.shape) == axes + 1 and isinstance(kind.shape[axes], int)


def _leading(program: Program, node: fx.Node, axes: int) -> tuple[Any, ...]:
    kind = program.type_of(node)
    assert isinstance(kind, TensorType)
    return kind.shape[:axes]


def again(rewriter: Rewriter, node: fx.Node, mapping: Mapping[fx.Node, fx.Node]) -> fx.Node:
    """The same call on other operands."""
    operands: Any = fx.node.map_arg((node.args, node.kwargs), lambda item: mapping.get(item, item))
    args, kwargs = operands
    return rewriter.call(node.target, *args, like=node, **kwargs)
