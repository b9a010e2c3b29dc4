"""What a model that classifies after every repetition is trained with."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.nn import functional

from graphwright.ir.errors import InputError
from graphwright.passes.distillation.losses import kl_divergence


def repetition_weights(count: int, given: Sequence[float] | None = None) -> tuple[float, ...]:
    """The weights of the repetitions' losses; their sum is 1.

    Args:
        count: how many repetitions there are.
        given: other weights than ``w_i = i / Σ i`` (Hooper et al., SPEED), for i from 1; they are divided by their sum.

    Raises:
        InputError: there are not as many, one is negative or not finite, or all are 0.
    """
    weights = [float(number) for number in range(1, count + 1)] if given is None else [float(each) for each in given]
    if len(weights) != count:
        raise InputError(f"{len(weights)} weights for {count} repetitions", where="weights")
    if not all(math.isfinite(each) and each >= 0 for each in weights) or sum(weights) == 0:
        raise InputError(f"must be positive numbers, not {tuple(weights)}", where="weights")
    return tuple(each / sum(weights) for each in weights)


def repetition_loss(
    logits: Sequence[torch.Tensor],
    labels: torch.Tensor,
    *,
    weights: Sequence[float] | None = None,
    teacher: torch.Tensor | None = None,
    mix: float = 0.5,
    temperature: float = 1.0,
) -> torch.Tensor:
    """``L_w = Σ w_i L_i`` over the repetitions (Hooper et al., SPEED).

    ``L_i`` is the mean cross entropy of repetition i. With a teacher it is ``(1 - mix)`` of that and ``mix · T²`` of
    ``KL(teacher ‖ student)`` at temperature T (Hinton et al. 2015).

    Args:
        logits: of each repetition, ``[..., V]``, as ``repetition_logits`` has them.
        labels: int64 ``[...]``: the class of each position, for language models already moved by one token; positions
            of -100 are left out.
        weights: see :func:`repetition_weights`.
        teacher: logits of the model before its layers were shared, ``[..., V]``; no gradient goes to them.
        mix: how much of the loss is the teacher's, from 0 to 1.
        temperature: T, above 0.

    Raises:
        InputError: weights, mix or temperature do not fit; shapes differ; no position is left.
    """
    factors = repetition_weights(len(logits), weights)
    if not 0 <= mix <= 1 or not (math.isfinite(temperature) and temperature > 0):
        raise InputError(f"mix {mix} must be within 0..1, temperature {temperature} above 0", where="repetition_loss")
    others = [] if teacher is None else [("teacher", teacher)]
    for name, each in [*((f"repetition {at}", each) for at, each in enumerate(logits)), *others]:
        if each.shape[:-1] != labels.shape or each.shape[-1] != logits[0].shape[-1]:
            raise InputError(
                f"logits are {list(each.shape)}, the labels {list(labels.shape)}", where=f"repetition_loss: {name}"
            )
    kept = labels != -100
    if not bool(kept.any()):
        raise InputError("every label is -100, so that no position is left", where="repetition_loss: labels")
    total = logits[0].new_zeros(())
    for factor, each in zip(factors, logits, strict=True):
        loss = functional.cross_entropy(each[kept], labels[kept])
        if teacher is not None:
            loss = (1 - mix) * loss + mix * kl_divergence(each, teacher, kept, temperature)
        total = total + factor * loss
    return total
