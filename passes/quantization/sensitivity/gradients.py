"""Gradients of a loss with respect to the weights of linears: their mean, and the diagonal of the Fisher matrix.

Both follow from the gradient of each linear's output and from its input, so a weight's own gradient never has to
exist for a batch at a time, and only the sum of what is wanted is kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from graphwright.ir.errors import InputError
from graphwright.ir.program import Program
from graphwright.passes.calibration import Batch
from graphwright.passes.calibration.batches import flatten
from graphwright.passes.calibration.stream import run_nodes
from graphwright.passes.quantization.schedule import weight_name
from graphwright.passes.quantization.sensitivity.losses import ModelLoss
from graphwright.passes.quantization.targets import LinearTarget

# Statistics held at a time, in bytes; linears are worked through in stretches of so many.
_HELD = 1 << 30


def stretches(program: Program, targets: Mapping[str, Sequence[LinearTarget]]) -> Iterator[list[str]]:
    """Weights, by name, whose statistics fit the memory together."""
    held, chunk = 0, list[str]()
    for name, users in targets.items():
        size = 4 * program.tensor(users[0].weight).numel()
        if chunk and held + size > _HELD:
            yield chunk
            held, chunk = 0, []
        held += size
        chunk.append(name)
    if chunk:
        yield chunk


def gradient_statistics(
    program: Program, targets: Sequence[LinearTarget], batches: Iterable[Batch], loss: ModelLoss, *, squared: bool
) -> dict[str, torch.Tensor]:
    """A statistic of the gradient for each weight.

    Args:
        program: what the batches run through.
        targets: linears of it; those that share a weight are summed.
        batches: arguments of a call each, and what the loss needs.
        loss: whose gradients they are.
        squared: the Fisher diagonal ``mean (∂l/∂w)²``, ``l`` being the loss of a row (token), instead of the mean
            gradient ``∂L/∂w``.

    Returns:
        ``[out, in]`` float32 by weight name.

    Raises:
        InputError: a batch does not fit, or the loss or a gradient is not finite.
    """
    found: dict[str, torch.Tensor] = {}
    weights = {name: tensor.detach() for name, tensor in program.tensors().items()}
    count = 0
    for index, batch in enumerate(batches):
        count += 1
        inputs, _ = flatten(program, arguments_only(program, batch), index)
        with torch.enable_grad():
            values, probes = _forward(program, targets, inputs, weights)
            value = loss.gradient_of(outputs_of(program, values), inputs, batch)
            if not bool(torch.isfinite(value)):
                raise InputError(f"the loss of calibration batch {index + 1} is {float(value)}", where="sensitivities")
            try:
                gradients = torch.autograd.grad(value, probes, allow_unused=True)
            except RuntimeError as error:
                raise InputError(
                    f"no gradient flows from the loss to the linears: {error}",
                    where="sensitivities",
                    hint="use a loss of the outputs, or measure='output' or 'loss', which need no gradients",
                ) from error
        for target, gradient in zip(targets, gradients, strict=True):
            if gradient is None:
                continue
            up = gradient.detach().reshape(-1, gradient.shape[-1]).to(torch.float32)
            x = values[target.x].detach().reshape(len(up), -1).to(torch.float32)
            if squared:
                each = (up.square().T @ x.square()) * (len(up) if loss.is_mean else 1)
            else:
                each = up.T @ x
            name = weight_name(target)
            found[name] = found[name] + each if name in found else each
    if not count:
        raise InputError("there is no calibration data", hint="give at least one batch")
    for target in targets:
        name = weight_name(target)
        if name not in found:
            shape = weights[name].shape
            found[name] = torch.zeros(shape[::-1] if target.transposed else shape)
        if not bool(torch.isfinite(found[name]).all()):
            raise InputError("its gradient is NaN or infinite on the calibration data", where=f"weight {name!r}")
    return {name: value / count for name, value in found.items()}


def _forward(
    program: Program, targets: Sequence[LinearTarget], inputs: list[torch.Tensor], weights: dict[str, torch.Tensor]
) -> tuple[dict[fx.Node, Any], list[torch.Tensor]]:
    """Values of all nodes, and a zero added to each linear's output whose gradient is that of the output."""
    values: dict[fx.Node, Any] = dict(zip(program.inputs, inputs, strict=True))
    by_node = {target.node: target for target in targets}
    probes: dict[fx.Node, torch.Tensor] = {}
    stretch: list[fx.Node] = []
    for node in program.nodes:
        if node.op != "call_function":
            continue
        stretch.append(node)
        if node in by_node:
            values = run_nodes(program, stretch, values, weights)
            output = values[node]
            assert isinstance(output, torch.Tensor)
            probes[node] = torch.zeros_like(output, requires_grad=True)
            values[node] = output + probes[node]
            stretch = []
    return run_nodes(program, stretch, values, weights), [probes[target.node] for target in targets]


def outputs_of(program: Program, values: Mapping[fx.Node, Any]) -> tuple[Any, ...]:
    """The program's flat outputs from the values of its nodes."""
    items = program.output.args[0]
    assert isinstance(items, tuple | list)
    return tuple(
        item if not isinstance(item, fx.Node) else program.tensor(item) if item.op == "get_attr" else values[item]
        for item in items
    )


def arguments_only(program: Program, batch: Batch) -> Batch:
    """A batch without what only the loss reads, such as labels."""
    if not isinstance(batch, Mapping):
        return batch
    args_spec, kwargs_spec = program.signature.in_spec.children()
    known = {*program.signature.parameters[: args_spec.num_children], *kwargs_spec.context}
    return {key: value for key, value in batch.items() if key in known}
