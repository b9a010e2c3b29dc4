"""Losses between a student and its teacher, as functions of what the two give.

All compute in float32 at least, leave padding out, and send no gradient to the teacher.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

from graphwright.ir.errors import InputError

IGNORED = -100


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean of ``-log softmax(logits)[label]`` over the labels that are not -100.

    Args:
        logits: floating ``[..., classes]``.
        labels: int64 ``[...]``.

    Returns:
        float32 scalar (float64 for float64 logits).

    Raises:
        InputError: the shapes do not fit, or every label is -100.
    """
    if labels.shape != logits.shape[:-1]:
        raise InputError(f"has shape {list(labels.shape)}, the logits {list(logits.shape)}", where="labels")
    if not bool((labels != IGNORED).any()):
        raise InputError("are all -100: nothing is left to learn", where="labels")
    return functional.cross_entropy(_wide(logits).flatten(0, -2), labels.flatten(), ignore_index=IGNORED)


def kl_divergence(
    student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None = None, temperature: float = 1.0
) -> torch.Tensor:
    """``T² · mean KL(softmax(teacher / T) ‖ softmax(student / T))``, the mean over rows that are no padding.

    Hinton et al. 2015, "Distilling the knowledge in a neural network", section 2 (also for T², which keeps the size of
    the gradient); at T = 1 the logit loss of Kurtic et al. 2023, "Sparse fine-tuning for inference acceleration of
    large language models", section 2.

    Args:
        student: logits, floating ``[..., classes]``.
        teacher: logits, floating, the same shape.
        mask: ``[...]``, zero where a row is padding; ``None`` for none.
        temperature: T, above 0.

    Returns:
        scalar, in nats.

    Raises:
        InputError: shapes differ, everything is padding, or the temperature is not positive.
    """
    if not temperature > 0:
        raise InputError(f"must be above 0, not {temperature!r}", where="temperature")
    _same(student, teacher, "logits")
    wanted = functional.log_softmax(_wide(teacher.detach()) / temperature, dim=-1)
    given = functional.log_softmax(_wide(student) / temperature, dim=-1)
    each = (wanted.exp() * (wanted - given)).sum(-1)
    return _mean(each, mask) * temperature**2


def square_head(
    student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor], mask: torch.Tensor | None = None
) -> torch.Tensor:
    """``Σ_l MSE(f_t^l, f_s^l) / MSE(f_t^l, 0)`` over the layers, padding left out.

    Kurtic et al. 2023, "Sparse fine-tuning for inference acceleration of large language models", section 2, where the
    loss of the task is added to it.

    Args:
        student: for each layer its hidden states, floating ``[batch, length, width]``.
        teacher: likewise.
        mask: ``[batch, length]``, zero where a position is padding; ``None`` for none.

    Returns:
        scalar: 0 for equal features, the number of layers for features that are zero.

    Raises:
        InputError: the layers or shapes do not match, everything is padding, or a teacher's features are all zero.
    """
    if len(student) != len(teacher) or not student:
        raise InputError(f"{len(student)} layers of the student, {len(teacher)} of the teacher", where="features")
    total: torch.Tensor | None = None
    for mine, wanted in zip(student, teacher, strict=True):
        _same(mine, wanted, "features")
        goal = _wide(wanted.detach())
        size = _mean(goal.square().mean(-1), mask)
        if float(size) == 0.0:
            raise InputError("a layer of the teacher gives zeros only", where="features")
        part = _mean((goal - _wide(mine)).square().mean(-1), mask) / size
        total = part if total is None else total + part
    assert total is not None
    return total


def hidden_cosine(student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Mean of ``1 - cos(h_t, h_s)`` over positions that are no padding.

    Sanh et al. 2019, "DistilBERT, a distilled version of BERT", section 3, ``L_cos``.

    Args:
        student: hidden states, floating ``[..., width]``.
        teacher: the same shape.
        mask: ``[...]``, zero where a position is padding; ``None`` for none.

    Raises:
        InputError: shapes differ, or everything is padding.
    """
    _same(student, teacher, "hidden states")
    return _mean(1 - functional.cosine_similarity(_wide(student), _wide(teacher.detach()), dim=-1), mask)


def nearest_neighbours(student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor, k: int = 1) -> torch.Tensor:
    """``(1/n) Σ_x Σ_{s ∈ G_k(x)} ‖f_t(s) - g_s(x)‖²`` over the n samples x of the batch.

    ``G_k(x)`` are the k samples of the batch with x's label, itself among them, whose teacher features ``f_t`` are
    nearest to x's student feature ``g_s(x)``; all of them where the batch has fewer. Which ones they are takes no
    gradient. Saadi et al., class-based feature distillation, ``L_hid``.

    Args:
        student: a feature for each sample, floating ``[batch, width]``.
        teacher: likewise.
        labels: int64 ``[batch]``.
        k: neighbours, at least 1.

    Raises:
        InputError: shapes do not match, or k is below 1.
    """
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise InputError(f"must be a whole number from 1, not {k!r}", where="k")
    _same(student, teacher, "features")
    if student.dim() != 2 or labels.shape != student.shape[:1]:
        raise InputError(
            f"have shape {list(student.shape)} and the labels {list(labels.shape)}, not [batch, width] and [batch]",
            where="features",
        )
    mine, goal = _wide(student), _wide(teacher.detach())
    distances = (mine[:, None, :] - goal[None, :, :]).square().sum(-1)
    kin = labels[:, None] == labels[None, :]
    order = distances.detach().masked_fill(~kin, float("inf")).argsort(dim=-1, stable=True)[:, :k]
    return (distances.gather(1, order) * kin.gather(1, order)).sum() / len(labels)


def _wide(value: torch.Tensor) -> torch.Tensor:
    return value if value.dtype == torch.float64 else value.float()


def _same(student: torch.Tensor, teacher: torch.Tensor, what: str) -> None:
    if student.shape != teacher.shape:
        raise InputError(
            f"of the student have shape {list(student.shape)}, of the teacher {list(teacher.shape)}",
            where=what,
            hint="compare what has kept its width: a student without some hidden dims has logits, not these features",
        )


def _mean(each: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    if mask is None:
        return each.mean()
    if mask.shape != each.shape:
        raise InputError(f"has shape {list(mask.shape)}, what it covers {list(each.shape)}", where="mask")
    kept = mask != 0
    if not bool(kept.any()):
        raise InputError("says that everything is padding", where="mask")
    # Padding may hold infinities, which a product with 0 would keep.
    return each[kept].mean()
