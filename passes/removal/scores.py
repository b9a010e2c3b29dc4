"""How much each unit counts: from weights, from what linears read, or from gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import fx

from graphwright.ir.arguments import arguments_of
from graphwright.ir.errors import InputError
from graphwright.ir.names import op_name
from graphwright.ir.program import Program
from graphwright.passes.calibration import Batch
from graphwright.passes.calibration.batches import flatten
from graphwright.passes.quantization.sensitivity.gradients import arguments_only
from graphwright.passes.quantization.sensitivity.losses import LossFunction, model_loss
from graphwright.passes.removal.units import Units

Score = Literal["magnitude", "activation", "taylor"]
SCORES = ("magnitude", "activation", "taylor")


def unit_scores(
    units: Units,
    score: Score,
    batches: Iterable[Batch],
    loss: LossFunction | None = None,
    labels: str | None = None,
) -> Callable[[int], float]:
    """A score for each unit; of those with the lowest the model misses least.

    - ``magnitude``: length of all weights of the unit (Fang et al. 2023, "DepGraph", equation 4, with p = 2).
    - ``activation``: ``sqrt(Σ (|W_ij| ‖x_j‖)²)`` over all weights of linears in the unit, with ``x_j``, what a linear
      reads, over the calibration data (Sun et al. 2023, "Wanda", equation 1, summed as lengths are).
    - ``taylor``: ``|Σ w ∂L/∂w|`` over all weights of the unit (Molchanov et al. 2019, equation 8; Ma et al. 2023,
      "LLM-Pruner", equation 4).

    Args:
        units: whose.
        score: which.
        batches: calibration data, read by all but ``magnitude``.
        loss: of outputs and batch, whose gradient is taken; the model's usual one by default.
        labels: entry of the batches that has the labels for the usual loss.

    Raises:
        InputError: there is no calibration data, or a score is not finite.
    """
    program = units.program
    if score == "magnitude":
        parts = {name: tensor.detach().float().square() for name, tensor in _weights(units).items()}
    elif score == "activation":
        parts = _read(program, batches)
    else:
        parts = _gradients(program, batches, loss, labels)
    totals: dict[int, float] = {}
    for axis in units.labels:
        part = parts.get(str(axis.node.target)) if axis.node.op == "get_attr" else None
        if part is None or part.dim() <= axis.place:
            continue
        along = part.double().movedim(axis.place, 0).reshape(part.shape[axis.place], -1).sum(1)
        roots, place = torch.unique(units.of(axis), return_inverse=True)
        sums = torch.zeros(len(roots), dtype=torch.float64).index_add_(0, place, along)
        for root, value in zip(roots.tolist(), sums.tolist(), strict=True):
            totals[root] = totals.get(root, 0.0) + value
    for value in totals.values():
        if not abs(value) < float("inf"):
            raise InputError(
                f"a unit's score is {value}: the weights, the data or the loss are not finite", where=score
            )
    return lambda unit: abs(totals.get(unit, 0.0)) ** (1.0 if score == "taylor" else 0.5)


def _weights(units: Units) -> dict[str, torch.Tensor]:
    program = units.program
    names = {str(axis.node.target) for axis in units.labels if axis.node.op == "get_attr"}
    found = {name: program.tensor(name) for name in names}
    return {name: tensor for name, tensor in found.items() if tensor.is_floating_point()}


def _read(program: Program, batches: Iterable[Batch]) -> dict[str, torch.Tensor]:
    """Squares of weights times those of what they are multiplied with, by name."""
    targets = {node: found for node in program.nodes if (found := _linear(node)) is not None}
    sums: dict[fx.Node, torch.Tensor] = {}

    class Run(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            if n in targets:
                x = self.env[targets[n][0]].detach()
                found = x.reshape(-1, x.shape[-1]).double().square().sum(0)
                sums[n] = sums[n] + found if n in sums else found
            return super().run_node(n)

    with torch.no_grad():
        for index, batch in enumerate(batches):
            Run(program.body).run(*flatten(program, arguments_only(program, batch), index)[0])
    if not sums:
        raise InputError("there is no calibration data", where="calibration", hint="give at least one batch")
    parts: dict[str, torch.Tensor] = {}
    for node, total in sums.items():
        _, weight, transposed = targets[node]
        part = program.tensor(weight).detach().double().square() * (total.unsqueeze(1) if transposed else total)
        name = str(weight.target)
        parts[name] = parts[name] + part if name in parts else part
    return parts


def _linear(node: fx.Node) -> tuple[fx.Node, fx.Node, bool] | None:
    """What a linear reads, its weight, and whether that is stored ``[in, out]``; in any floating dtype."""
    given = arguments_of(node) if node.op == "call_function" else {}
    name = op_name(node)
    if name == "aten.linear":
        x, weight = given["input"], given["weight"]
    elif name == "aten.addmm":
        x, weight = given["mat1"], given["mat2"]
    elif name in ("aten.mm", "aten.matmul"):
        x, weight = given["self"], given.get("mat2", given.get("other"))
    else:
        return None
    held = isinstance(weight, fx.Node) and weight.op == "get_attr" and len(weight.meta["val"].shape) == 2
    return (x, weight, name != "aten.linear") if held else None


def _gradients(
    program: Program, batches: Iterable[Batch], loss: LossFunction | None, labels: str | None
) -> dict[str, torch.Tensor]:
    """Weights times their mean gradients, by name."""
    judged = model_loss(program, loss, labels)
    tensors = {name: each.detach() for name, each in program.tensors().items()}
    trained = {name: each.requires_grad_() for name, each in tensors.items() if each.is_floating_point()}
    sums = {name: torch.zeros_like(each) for name, each in trained.items()}
    count = 0
    for index, batch in enumerate(batches):
        inputs, _ = flatten(program, arguments_only(program, batch), index)
        with torch.enable_grad():
            outputs = torch.func.functional_call(program.body, {**tensors, **trained}, tuple(inputs))
            value = judged.gradient_of(tuple(outputs), inputs, batch)
            found = torch.autograd.grad(value, list(trained.values()), allow_unused=True)
        for name, gradient in zip(trained, found, strict=True):
            if gradient is not None:
                sums[name] += gradient
        count += 1
    if not count:
        raise InputError("there is no calibration data", where="calibration", hint="give at least one batch")
    return {name: total * trained[name].detach() / count for name, total in sums.items()}
