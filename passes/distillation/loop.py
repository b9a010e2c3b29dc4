"""A training loop that fits a screen: a student learns from its teacher."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from graphwright.ir.errors import InputError
from graphwright.ir.program import Program, require_program
from graphwright.passes.base import as_json
from graphwright.passes.distillation.objective import Loss, Objective
from graphwright.passes.distillation.state import TrainingFolder, digest_of_batches
from graphwright.passes.progress import progress
from graphwright.passes.quantization.checkpoint import fingerprint_of

OptimizerFactory = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
Schedule = Callable[[int, int], float]


@dataclass(frozen=True)
class Distilled:
    """What a run came to.

    Attributes:
        steps: taken in all, by earlier runs that it went on from too.
        losses: of each step the total under ``loss`` and each term under its name, without its weight.
    """

    steps: int
    losses: tuple[Mapping[str, float], ...]


def warmup_then_linear(step: int, steps: int) -> float:
    """The rate's factor: up to 1 over the first tenth of the steps, then down in a line, to 0 behind the last."""
    rising = max(steps // 10, 1)
    return min((step + 1) / rising, (steps - step) / (steps - rising + 1))


def distill(
    student: Program,
    teacher: Program | None,
    data: Iterable[Mapping[str, Any]],
    *,
    loss: Loss | Sequence[Loss],
    steps: int | None = None,
    learning_rate: float = 1e-4,
    optimizer: OptimizerFactory | None = None,
    schedule: Schedule = warmup_then_linear,
    max_norm: float | None = 1.0,
    seed: int = 0,
    teacher_dtype: torch.dtype | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_steps: int = 100,
) -> Distilled:
    """Train a student, in place, towards its teacher.

    ::

        dense = gw.trace(model, batch)
        student = gw.optimize(dense, [...], example_inputs=batch)          # pruned, quantised, made smaller
        gw.distill(student, dense, batches, loss=[gw.CrossEntropy(causal=True), gw.SquareHead()], steps=300)

    Weights that both share are copied for the student first: the teacher stays as it is. What trains are the student's
    parameters that take gradients; masks that are part of the program hold as it trains. The batches are taken in
    another order in every round, by ``seed``.

    Args:
        student: trained.
        teacher: ``None`` where no term compares with one.
        data: batches, each a mapping with the arguments of both programs and what the loss needs, such as labels.
            Anything that is no sequence is read once and kept.
        loss: terms, whose weighted sum is minimised, or functions of the student's output, the teacher's and the batch
            (both :class:`Tapped`: the programs' outputs with ``features``).
        steps: optimizer steps, a batch each; one round over the data by default.
        learning_rate: of the default optimizer, AdamW without weight decay.
        optimizer: makes another one of the parameters, such as ``lambda p: torch.optim.SGD(p, 0.1)``.
        schedule: factor on the optimizer's rates at a step, from its number and the number of steps.
        max_norm: the gradient of all parameters together is shortened to this length; ``None`` leaves it.
        seed: of the order of batches and of torch's random numbers.
        teacher_dtype: stores the teacher's weights in this dtype, see :func:`graphwright.teacher_of`.
        checkpoint: a folder. A run that was killed goes on from there and ends with the bits it would have had, when it
            is given the same student, teacher, data and options.
        checkpoint_steps: how many steps lie between two states that are written there.

    Returns:
        the losses.

    Raises:
        InputError: an option does not fit, nothing trains, a batch does not fit, a loss is not finite, or the folder is
            of another run.
        SerializationError: the folder cannot be read or written.
    """
    require_program(student)
    batches = data if isinstance(data, Sequence) else list(data)
    count = _checked(batches, steps, max_norm, checkpoint_steps)
    objective = Objective(student, teacher, loss, teacher_dtype=teacher_dtype)
    trained = {name: each for name, each in student.named_parameters() if each.requires_grad}
    parameters = list(trained.values())
    chosen = optimizer(parameters) if optimizer else torch.optim.AdamW(parameters, learning_rate, weight_decay=0.0)
    rates = [group["lr"] for group in chosen.param_groups]
    folder, history = None, list[Mapping[str, float]]()
    if checkpoint is not None:
        options = (objective.described(), count, learning_rate, as_json(optimizer), as_json(schedule), max_norm, seed)
        folder = TrainingFolder(checkpoint, _fingerprint(student, teacher, batches, repr((*options, rates))))

    with torch.random.fork_rng(devices=()), progress("distill", count) as shown:
        torch.manual_seed(seed)
        if folder is not None and (found := folder.load(trained, chosen)) is not None:
            history = found["losses"]
        shown.step(len(history))
        for step in range(len(history), count):
            total, parts = objective(_batch(batches, step, seed))
            chosen.zero_grad(set_to_none=True)
            total.backward()
            if max_norm is not None:
                nn.utils.clip_grad_norm_(parameters, max_norm, error_if_nonfinite=True)
            for group, rate in zip(chosen.param_groups, rates, strict=True):
                group["lr"] = rate * schedule(step, count)
            chosen.step()
            history.append(parts)
            shown.now(f"loss {parts['loss']:.4g}")
            shown.step()
            if folder is not None and ((step + 1) % checkpoint_steps == 0 or step + 1 == count):
                folder.save(trained, chosen, step + 1, losses=history)
    for each in parameters:
        each.grad = None
    return Distilled(count, tuple(history))


def _checked(
    batches: Sequence[Mapping[str, Any]], steps: int | None, max_norm: float | None, checkpoint_steps: int
) -> int:
    """The number of steps, after a look at the options."""
    if isinstance(batches, Mapping | str) or not len(batches) or not isinstance(batches[0], Mapping):
        raise InputError("must be batches, each a mapping of arguments", where="distill: data", hint="give [batch]")
    count = len(batches) if steps is None else steps
    for name, number in (("steps", count), ("checkpoint_steps", checkpoint_steps)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise InputError(f"must be a whole number from 1, not {number!r}", where=f"distill: {name}")
    if max_norm is not None and not 0 < max_norm < math.inf:
        raise InputError(f"must be a positive number or None, not {max_norm!r}", where="distill: max_norm")
    return count


def _batch(batches: Sequence[Mapping[str, Any]], step: int, seed: int) -> Mapping[str, Any]:
    """The batch of a step: known from its number alone, so that a run can go on anywhere."""
    turn, place = divmod(step, len(batches))
    order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(seed * 1_000_003 + turn))
    return batches[int(order[place])]


def _fingerprint(
    student: Program, teacher: Program | None, batches: Sequence[Mapping[str, Any]], options: str
) -> dict[str, str]:
    mine = fingerprint_of(student, options, "")
    goal = fingerprint_of(teacher, "", "") if teacher is not None else {"program": "", "weights": ""}
    return {
        "version of graphwright": mine["version"],
        "student": f"{mine['program']} {mine['weights']}",
        "teacher": f"{goal['program']} {goal['weights']}",
        "options": mine["options"],
        "data": digest_of_batches(batches),
    }
