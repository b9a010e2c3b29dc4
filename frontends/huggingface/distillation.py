"""A student that learns from its teacher in transformers' ``Trainer``."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from graphwright.frontends.huggingface.trainer import Trainable
from graphwright.ir.checkpointing import checkpoint_blocks
from graphwright.ir.program import Program
from graphwright.passes.distillation.objective import Loss, Objective


class Distilling(Trainable):
    """What :func:`distilling` gives.

    Attributes:
        program: the student, the same object that was given.
        student: the student with taps, over the same parameters.
        teacher: frozen; no part of what is saved.
    """

    def __init__(self, program: Program, objective: Objective) -> None:
        super().__init__(program)
        self.student, self.teacher = objective.student, objective.teacher
        self._objective = objective

    def forward(self, **batch: Any) -> Any:
        """The loss of a batch, and the logits where the student gives some."""
        total, _, given = self._objective.with_output(batch)
        logits = given.output if isinstance(given.output, torch.Tensor) else getattr(given.output, "logits", None)
        return {"loss": total} if logits is None else {"loss": total, "logits": logits}

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: Mapping[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Compute the student's layers again in the backward pass."""
        super().activation_checkpointing_enable(activation_checkpointing_kwargs, every_n_layers, offload)
        checkpoint_blocks(self.student)

    def gradient_checkpointing_disable(self) -> None:
        """Keep everything for the backward pass again."""
        super().gradient_checkpointing_disable()
        checkpoint_blocks(self.student, enabled=False)


def distilling(
    student: Program,
    teacher: Program | None,
    *,
    loss: Loss | Sequence[Loss],
    columns: Sequence[str] = ("labels",),
    teacher_dtype: torch.dtype | None = None,
) -> Distilling:
    """A module with which transformers' ``Trainer`` trains a student towards its teacher.

    ::

        module = gw.distilling(student, dense, loss=[gw.TaskLoss(), gw.SquareHead()])
        Trainer(module, TrainingArguments("run"), train_dataset=data).train()

    The Trainer does the rest as it does for any model, checkpoints and resuming included; they hold what trains of the
    student. See :func:`graphwright.distill` for a loop without transformers, and for what is copied.

    Args:
        student: trained in place.
        teacher: ``None`` where no term compares with one.
        loss: terms or functions, see :func:`graphwright.distill`.
        columns: of the data, which the terms read besides the student's arguments; the Trainer leaves out others.
        teacher_dtype: stores the teacher's weights in this dtype.

    Raises:
        InputError: an option does not fit, or nothing trains.
    """
    objective = Objective(student, teacher, loss, teacher_dtype=teacher_dtype)

    def forward(self: Distilling, **batch: Any) -> Any:
        return Distilling.forward(self, **batch)

    # The Trainer reads the names of labels and of columns from the class.
    names = dict.fromkeys((*student.signature.tensor_arguments(), *columns))
    named = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in names]
    itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    forward.__signature__ = inspect.Signature([itself, *named])  # type: ignore[attr-defined]
    kind: type[Distilling] = type(student.title, (Distilling,), {"forward": forward, "__doc__": Distilling.__doc__})
    return kind(student, objective)
