"""Multiply-accumulates of ATen operators, counted from shapes.

What is counted are the multiplications of matrix products, convolutions, attention and recurrent cells; elementwise
work, norms and reductions count as none. Causal attention counts in full, as kernels that skip nothing do it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Shape = tuple[int, ...]
# Arguments by schema name, tensors replaced by their shapes, and the shape of the result.
Rule = Callable[[Mapping[str, Any], Shape], int]


def rule_of(name: str) -> Rule | None:
    """The counting rule of an operator as written (``aten.linear``); ``None`` for one that counts as no work."""
    return _RULES.get(name)


def _product(left: str) -> Rule:
    """Each element of the result sums over the last dimension of the left operand."""

    def rule(arguments: Mapping[str, Any], result: Shape) -> int:
        left_shape: Shape = arguments[left]
        return math.prod(result) * left_shape[-1]

    return rule


def _convolution(arguments: Mapping[str, Any], result: Shape) -> int:
    # weight: [out channels, in channels / groups, *kernel]
    if arguments.get("transposed"):
        return _transposed_convolution(arguments, result)
    kernel: Shape = arguments["weight"][1:]
    return math.prod(result) * math.prod(kernel)


def _transposed_convolution(arguments: Mapping[str, Any], result: Shape) -> int:
    # weight: [in channels, out channels / groups, *kernel]; every input element meets all that its channel has.
    read: Shape = arguments["input"]
    kernel: Shape = arguments["weight"][1:]
    return math.prod(read) * math.prod(kernel)


def _attention(arguments: Mapping[str, Any], result: Shape) -> int:
    query, value = arguments["query"], arguments["value"]
    return int(math.prod(query[:-1]) * value[-2] * (query[-1] + value[-1]))


def _recurrent(arguments: Mapping[str, Any], result: Shape) -> int:
    # input: [steps, batch, features], or batch first; every step multiplies by each weight matrix once.
    read: Shape = arguments["input"]
    weights: Sequence[Shape] = arguments["params"]
    return math.prod(read[:2]) * sum(math.prod(shape) for shape in weights if len(shape) == 2)


def _einsum(arguments: Mapping[str, Any], result: Shape) -> int:
    equation = arguments["equation"].replace(" ", "")
    inputs, arrow, output = equation.partition("->")
    shapes: Sequence[Shape] = arguments["tensors"]
    terms = [_labels(term, shape) for term, shape in zip(inputs.split(","), shapes, strict=True)]
    sizes: dict[str, int] = {}
    for label, size in (pair for term in terms for pair in term):
        if size != 1 or label not in sizes:  # dimensions of size 1 are broadcast
            sizes[label] = size
    if arrow:
        kept = set(output.replace("...", "")) | {label for label in sizes if label.isdigit()}
    else:
        letters = inputs.replace(",", "").replace("...", "")
        kept = {label for label in letters if letters.count(label) == 1} | {name for name in sizes if name.isdigit()}
    # Two at a time from the left, as torch does it; a label goes when no later operand and not the result has it.
    total, present = 0, {label for label, _ in terms[0]}
    for index, term in enumerate(terms[1:], start=1):
        present |= {label for label, _ in term}
        total += math.prod(sizes[label] for label in present)
        later = {label for rest in terms[index + 1 :] for label, _ in rest}
        present &= kept | later
    return total


def _labels(term: str, shape: Shape) -> list[tuple[str, int]]:
    """Labels of one operand with their sizes; dimensions under an ellipsis are numbered from the right."""
    if "..." not in term:
        return list(zip(term, shape, strict=True))
    before, after = term.split("...")
    middle = len(shape) - len(before) - len(after)
    numbered = [str(middle - place) for place in range(middle)]
    return list(zip([*before, *numbered, *after], shape, strict=True))


_RULES: dict[str, Rule] = {
    "aten.linear": _product("input"),
    "aten.matmul": _product("self"),
    "aten.mm": _product("self"),
    "aten.bmm": _product("self"),
    "aten.mv": _product("self"),
    "aten.dot": _product("self"),
    "aten.addmm": _product("mat1"),
    "aten.addmv": _product("mat"),
    "aten.baddbmm": _product("batch1"),
    "aten.einsum": _einsum,
    "aten.conv1d": _convolution,
    "aten.conv1d.padding": _convolution,
    "aten.conv2d": _convolution,
    "aten.conv2d.padding": _convolution,
    "aten.conv3d": _convolution,
    "aten.conv3d.padding": _convolution,
    "aten.convolution": _convolution,
    "aten.conv_transpose1d": _transposed_convolution,
    "aten.conv_transpose2d.input": _transposed_convolution,
    "aten.conv_transpose3d.input": _transposed_convolution,
    "aten.scaled_dot_product_attention": _attention,
    "aten.lstm.input": _recurrent,
    "aten.gru.input": _recurrent,
    "aten.rnn_tanh.input": _recurrent,
    "aten.rnn_relu.input": _recurrent,
}
