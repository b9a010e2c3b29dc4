"""What pruning a weight to each of some sparsities would cost, all others being whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from graphwright.ir.program import Program
from graphwright.passes.calibration import CalibrationData, Observed, Stream
from graphwright.passes.quantization.sensitivity.gradients import arguments_only, gradient_statistics, stretches
from graphwright.passes.quantization.sensitivity.losses import model_loss
from graphwright.passes.quantization.targets import LinearTarget
from graphwright.passes.quantization.weights import check_finite
from graphwright.passes.sparsity.allocation import LossDriven
from graphwright.passes.sparsity.calibrated import Task
from graphwright.passes.sparsity.methods import Norms, scored, squares_of
from graphwright.passes.sparsity.targets import matrix_of


def costs_of(
    program: Program, tasks: Sequence[Task], data: CalibrationData, way: LossDriven, levels: Sequence[float]
) -> dict[str, list[float]]:
    """By weight, the cost of each level; the program is not changed.

    Raises:
        InputError: the calibration data or a weight does not serve.
    """
    users: dict[str, Sequence[LinearTarget]] = {task.name: task.targets for task in tasks}
    by_name = {task.name: task for task in tasks}
    judged = model_loss(program, None, None)
    found: dict[str, list[float]] = {}
    with Stream(program, (arguments_only(program, batch) for batch in data)) as stream:
        for names in stretches(program, users):
            every = [target for name in names for target in users[name]]
            fisher: Mapping[str, torch.Tensor] = {}
            if way.measure == "fisher":
                fisher = gradient_statistics(program, every, data, judged, squared=True)
            for name in names:
                task = by_name[name]
                stream.advance(task.targets[0].node)
                rows = stream.rows(task.targets[0].x)
                inputs = Norms.over(rows) if name in fisher else Observed.over(rows)
                weight = matrix_of(program, task.targets[0])
                check_finite(weight, name)
                found[name] = _costs(weight.to(torch.float32), task, inputs, fisher.get(name), levels)
    return found


def _costs(
    weight: torch.Tensor, task: Task, inputs: Any, fisher: torch.Tensor | None, levels: Sequence[float]
) -> list[float]:
    scores = scored(weight, squares_of(inputs), fixed=task.fixed)
    size = 1.0 if fisher is not None else max(_power(weight, inputs.moment), 1e-30)
    values: list[float] = []
    for level in levels:
        gone = torch.where(task.pattern.mask(scores, level), 0, weight)
        cost = 0.5 * float((fisher * gone.square()).sum()) if fisher is not None else _power(gone, inputs.moment)
        values.append(cost / size)
    return values


def _power(matrix: torch.Tensor, moment: torch.Tensor) -> float:
    return max(0.0, float(((matrix @ moment) * matrix).sum()))
