"""The proof that quantised linears run on quantised weights, read off the runtime's optimised graph.

Exporters write files that look quantised and run in float, because the runtime did not recognise the spelling. So the
graph that really runs is read back, and the product behind every linear's result is looked up in it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import onnx

from graphwright.backends.onnx.kernels import FLOAT_PRODUCTS, QUANTIZED_PRODUCTS
from graphwright.ir.errors import ExportError

# What may stand between a product and the linear's result: scales, bias, shape, and what a bias is fused with.
_BETWEEN = frozenset({"Add", "Mul", "Cast", "Reshape", "Squeeze", "Unsqueeze", "BiasGelu", "Identity"})
_DEPTH = 8


class Expected(Protocol):
    """A linear that must run on quantised weights, see ``lowering.QuantizedLinear``."""

    @property
    def node(self) -> str: ...

    @property
    def path(self) -> str: ...

    @property
    def value_names(self) -> frozenset[str]: ...


def prove_quantized(optimized: onnx.ModelProto, linears: Iterable[Expected], *, hint: str = "") -> dict[str, str]:
    """Find the kernel of every quantised linear.

    Args:
        optimized: the graph the runtime runs.
        linears: what must be quantised.
        hint: what to do when one is not.

    Returns:
        node name in the program -> runtime operator.

    Raises:
        ExportError: a linear runs in float, or its kernel cannot be found; all of them are named.
    """
    producers = {name: node for node in optimized.graph.node for name in node.output}
    found: dict[str, str] = {}
    bad: list[str] = []
    for linear in linears:
        kernels = {_product_behind(name, producers, _DEPTH) for name in linear.value_names} - {None}
        quantized = sorted(kernel for kernel in kernels if kernel in QUANTIZED_PRODUCTS)
        floating = sorted(kernel for kernel in kernels if kernel in FLOAT_PRODUCTS)
        place = linear.path or linear.node
        if floating:
            bad.append(f"{place}: runs in float, as {floating[0]}")
        elif quantized:
            found[linear.node] = quantized[0]
        else:
            bad.append(f"{place}: its kernel is not to be found in the runtime's graph")
    if bad:
        first = bad[0].partition(":")[0]
        raise ExportError(
            f"{len(bad)} quantised linear{'s' if len(bad) > 1 else ''} would not run on quantised weights",
            where=first,
            hint=hint or "onnxruntime does not fuse this encoding",
            context=bad[:20],
        )
    return found


def prove_attention(optimized: onnx.ModelProto, outputs: Iterable[str], kernel: str) -> None:
    """Check that one kernel makes the caches.

    Args:
        optimized: the graph the runtime runs.
        outputs: names of the caches that come out.
        kernel: operator that must give them.

    Raises:
        ExportError: another operator gives one.
    """
    producers = {name: str(node.op_type) for node in optimized.graph.node for name in node.output}
    for name in outputs:
        found = producers.get(name, "no operator")
        if found != kernel:
            raise ExportError(f"the cache is given by {found}, not by {kernel}", where=f"output {name!r}")


def _product_behind(name: str, producers: dict[str, onnx.NodeProto], depth: int) -> str | None:
    """The operator whose product gives a value, through scaling and bias."""
    node = producers.get(name)
    if node is None or depth == 0:
        return None
    if node.op_type in FLOAT_PRODUCTS | QUANTIZED_PRODUCTS:
        return str(node.op_type)
    if node.op_type not in _BETWEEN:
        return None
    # The product comes first; a bias or scale is stored, or computed from something that is no product.
    behind = (_product_behind(each, producers, depth - 1) for each in node.input)
    return next((kernel for kernel in behind if kernel is not None), None)
