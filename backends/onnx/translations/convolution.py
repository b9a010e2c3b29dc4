"""Convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from graphwright.backends.onnx.lowering import Lowering


def convolution(
    lower: Lowering,
    node: fx.Node,
    x: fx.Node,
    weight: fx.Node,
    bias: fx.Node | None,
    stride: Sequence[int],
    padding: Sequence[int] | str,
    dilation: Sequence[int],
    groups: int,
) -> None:
    """ONNX Conv, in one or two dimensions; ``padding`` may be ``"same"`` or ``"valid"``."""
    kernel = [int(size) for size in lower.shape(weight)[2:] if isinstance(size, int)]
    count = len(lower.shape(weight)) - 2
    steps, spread = _spread(stride, count), _spread(dilation, count)
    if padding == "valid":
        pads = [0] * (2 * count)
    elif padding == "same":
        total = [each * (size - 1) for each, size in zip(spread, kernel, strict=True)]
        pads = [each // 2 for each in total] + [each - each // 2 for each in total]
    else:
        pads = _spread(padding, count) * 2
    operands = [lower.tensor(x), lower.tensor(weight), *([lower.tensor(bias)] if bias is not None else [])]
    value = lower.graph.call("Conv", *operands, strides=steps, dilations=spread, pads=pads, group=int(groups))
    lower.set(node, value)


def _spread(values: Any, count: int) -> list[int]:
    numbers = [int(value) for value in values] if isinstance(values, Sequence) else [int(values)]
    return numbers * count if len(numbers) == 1 else numbers
