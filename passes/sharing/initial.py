"""What the weights of a shared layer are at first, from those of the layers that share it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx

from graphwright.ir.arguments import argument
from graphwright.ir.errors import InputError
from graphwright.ir.names import op_name
from graphwright.ir.program import Program
from graphwright.ir.stacks import Stack
from graphwright.passes.calibration import CalibrationData, Stream
from graphwright.passes.quantization.finite import is_finite

STARTS = ("first", "every-kth", "mean", "least-squares")

# What is added to the second moments, relative to their mean diagonal, with the mean of the layers as solution:
# features that the calibration data does not have keep the mean.
_DAMPING = 1e-4


def initial_weights(
    program: Program,
    stack: Stack,
    order: Sequence[int],
    places: Sequence[int],
    start: str,
    calibration: CalibrationData | None,
) -> dict[tuple[int, int], torch.Tensor]:
    """The values of each distinct layer's weights.

    Args:
        program: it has the weights of all layers.
        stack: the layers.
        order: for each layer the number of the distinct one that it uses.
        places: in the layers' weights, of those that are shared.
        start: ``first``: of the first layer that uses it. ``every-kth``: of layers spread evenly over the depth.
            ``mean``: of the layers that use it. ``least-squares``: linears get ``[W b]`` with the least
            ``Σ_i ‖[X_i 1] [W b]ᵀ - Y_i‖²``, where ``X_i`` and ``Y_i`` are what the linear of layer i reads and gives on
            the calibration data; other weights the mean.
        calibration: for ``least-squares``.

    Returns:
        by number of the distinct layer and place; tensors of the weights' dtype, or the weights themselves.

    Raises:
        InputError: least squares without calibration data; a weight that is not floating differs between layers.
    """
    groups = max(order) + 1
    members = {unique: [at for at, each in enumerate(order) if each == unique] for unique in range(groups)}
    every = len(order) // groups
    fitted = _least_squares(program, stack, order, places, calibration) if start == "least-squares" else {}
    found: dict[tuple[int, int], torch.Tensor] = {}
    for unique, layers in members.items():
        for place in places:
            tensors = [program.tensor(stack.layers[at].weights[place]) for at in layers]
            if not tensors[0].is_floating_point():
                _check_equal(stack, layers, place, tensors)
                found[unique, place] = tensors[0]
            elif (unique, place) in fitted:
                found[unique, place] = fitted[unique, place]
            elif start == "first":
                found[unique, place] = tensors[0]
            elif start == "every-kth":
                found[unique, place] = program.tensor(stack.layers[unique * every].weights[place])
            else:
                found[unique, place] = _mean(tensors)
    return found


def _mean(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    if all(each is tensors[0] for each in tensors):
        return tensors[0]
    total = torch.zeros_like(tensors[0], dtype=torch.float64)
    for each in tensors:
        total += each.detach()
    return (total / len(tensors)).to(tensors[0].dtype)


def _check_equal(stack: Stack, layers: Sequence[int], place: int, tensors: Sequence[torch.Tensor]) -> None:
    for at, each in zip(layers, tensors, strict=True):
        if not torch.equal(each, tensors[0]):
            names = [stack.layers[number].weights[place].target for number in (layers[0], at)]
            raise InputError(f"{names[0]} and {names[1]} are no numbers that could be shared, and differ")


# -- least squares -----------------------------------------------------------------------------------------------------


def _least_squares(
    program: Program,
    stack: Stack,
    order: Sequence[int],
    places: Sequence[int],
    calibration: CalibrationData | None,
) -> dict[tuple[int, int], torch.Tensor]:
    if calibration is None:
        raise InputError(
            "needs calibration data for start='least-squares'",
            where="share-layers: calibration",
            hint="give calibration=[batch, ...], or start='mean'",
        )
    pairs = _linears(stack, places)
    moments: dict[tuple[int, int], torch.Tensor] = {}
    products: dict[tuple[int, int], torch.Tensor] = {}
    with Stream(program, calibration) as stream:
        for at, layer in enumerate(stack.layers):
            known: dict[fx.Node, torch.Tensor] = {}
            for number in sorted(pairs, key=lambda each: layer.nodes[each]):
                node = layer.nodes[number]
                read = node.args[0]
                assert isinstance(read, fx.Node)
                if read not in known:
                    stream.advance(node)
                    known[read] = _moment(stream.rows(read))
                joint = _joint(program, node)
                key = order[at], number
                moments[key] = moments.get(key, torch.zeros(())) + known[read]
                products[key] = products.get(key, torch.zeros(())) + joint @ known[read]
    found: dict[tuple[int, int], torch.Tensor] = {}
    for (unique, number), moment in moments.items():
        nodes = [layer.nodes[number] for layer, each in zip(stack.layers, order, strict=True) if each == unique]
        if not is_finite(moment):
            raise InputError(
                "its input is NaN or infinite on the calibration data",
                where=f"%{nodes[0].name}",
                hint="check the calibration data and the weights",
            )
        mean = torch.stack([_joint(program, node) for node in nodes]).mean(0)
        damping = _DAMPING * float(moment.diagonal().mean())
        damped = moment + damping * torch.eye(len(moment), dtype=torch.float64)
        solved = torch.linalg.solve(damped, (products[unique, number] + damping * mean).T).T
        weight, bias = pairs[number]
        dtype = program.tensor(nodes[0].args[1]).dtype  # type: ignore[arg-type]
        found[unique, weight] = solved[:, : mean.shape[1] - 1].to(dtype).contiguous()
        if bias is not None:
            found[unique, bias] = solved[:, -1].to(dtype).contiguous()
    return found


def _linears(stack: Stack, places: Sequence[int]) -> dict[int, tuple[int, int | None]]:
    """Place of a linear among a layer's calls -> places of its weight and bias; those that are shared whole."""
    layer, found = stack.layers[0], dict[int, tuple[int, int | None]]()
    position = {node: place for place, node in enumerate(layer.weights)}
    for number, node in enumerate(layer.nodes):
        if op_name(node) != "aten.linear":
            continue
        weight, bias = (argument(node, name) for name in ("weight", "bias"))
        if position.get(weight) in places and (bias is None or position.get(bias) in places):
            found[number] = position[weight], None if bias is None else position[bias]
    return found


def _joint(program: Program, node: fx.Node) -> torch.Tensor:
    """``[W b]`` in float64, ``[out, in + 1]``; 0 where there is no bias."""
    weight = program.tensor(argument(node, "weight")).detach().double()
    bias: Any = argument(node, "bias")
    column = torch.zeros(len(weight)) if bias is None else program.tensor(bias).detach()
    return torch.cat((weight, column.double().unsqueeze(1)), 1)


def _moment(batches: Iterable[torch.Tensor]) -> torch.Tensor:
    """``Σ [x 1]ᵀ [x 1]`` in float64."""
    total: torch.Tensor | None = None
    for rows in batches:
        wide = torch.cat((rows.double(), torch.ones(len(rows), 1, dtype=torch.float64)), 1)
        total = wide.T @ wide if total is None else total + wide.T @ wide
    assert total is not None
    return total
