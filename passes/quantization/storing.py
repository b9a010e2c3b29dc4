"""Quantised weights and the linears on them, as they stand in a program."""

from __future__ import annotations

from typing import Any

from torch import fx

from graphwright.ir.rewriter import Rewriter
from graphwright.passes.quantization.activations import StaticGrid
from graphwright.passes.quantization.targets import LinearTarget
from graphwright.passes.quantization.weights import ChannelWeight, PackedWeight


def stem(weight: str) -> str:
    """What the names of new weights begin with: those of ``a.weight`` stand in ``a``, those of ``a.in_proj_weight``
    beside it."""
    return weight.removesuffix("weight") if weight.rpartition(".")[2] == "weight" else f"{weight}_"


def store(
    rewriter: Rewriter, packed: PackedWeight, base: str, like: fx.Node
) -> tuple[fx.Node, fx.Node, fx.Node | None]:
    """Weights of a packed matrix: codes, scales and zero points (``None`` when symmetric)."""
    tags = ("quantized",)
    codes = rewriter.weight(f"{base}qweight", packed.qweight, like=like, tags=tags)
    scales = rewriter.weight(f"{base}scales", packed.scales, like=like, tags=tags)
    zeros = packed.zero_points
    zero_points = rewriter.weight(f"{base}zero_points", zeros, like=like, tags=tags) if zeros is not None else None
    return codes, scales, zero_points


def packed_linear(
    rewriter: Rewriter,
    target: LinearTarget,
    packed: PackedWeight,
    operands: tuple[fx.Node, fx.Node, fx.Node | None],
    activations: tuple[int, str] | None = None,
) -> fx.Node:
    """The linear on packed weights that stands for another.

    Args:
        rewriter: of the program.
        target: the linear.
        packed: its weight.
        operands: what :func:`store` gave.
        activations: bits that its inputs are rounded to as they come, and the ranges' name; ``None``: they stay floats.
    """
    codes, scales, zero_points = operands
    book, group = packed.form.codebook, packed.group_size
    if book is not None:
        op, rest = "graphwright.linear_codebook", [codes, scales, target.bias, book, group]
        if activations is not None:  # the only numbers that activations are rounded to are those of the weights
            op, rest = "graphwright.linear_fp8_dynamic", [codes, scales, target.bias, group, activations[1]]
    else:
        op, rest = "graphwright.linear_nbits", [codes, scales, zero_points, target.bias, packed.form.bits, group]
        if activations is not None:
            op, rest = f"{op}_dynamic", [*rest, *activations]
    return rewriter.call(op, target.x, *rest, like=target.node, tags=("quantized",))


def channel_linear(
    rewriter: Rewriter, target: LinearTarget, packed: ChannelWeight, grid: StaticGrid | None, ranges: str
) -> fx.Node:
    """The linear on INT8 weights and activations that stands for another.

    Args:
        rewriter: of the program.
        target: the linear.
        packed: its weight.
        grid: of its inputs; ``None`` where their ranges come from the data.
        ranges: ``"per_tensor"``, or anything else for one to a token.
    """
    node, tags, base = target.node, ("quantized",), stem(str(target.weight.target))
    codes = rewriter.weight(f"{base}qweight", packed.qweight, like=node, tags=tags)
    scales = rewriter.weight(f"{base}scales", packed.scales, like=node, tags=tags)
    rest: tuple[Any, ...]
    if grid is None:
        mode = "per_tensor" if ranges == "per_tensor" else "per_token"
        op, rest = "graphwright.linear_int8_dynamic", (mode,)
    else:
        factors = rewriter.weight(f"{base}input_scales", grid.scales, like=node, tags=tags)
        op, rest = "graphwright.linear_int8_static", (factors, grid.zero_point)
    return rewriter.call(op, target.x, codes, scales, target.bias, *rest, like=node, tags=tags)
