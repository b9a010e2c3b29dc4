"""Terms of a distillation loss: what of the outputs each compares, and how much it counts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from graphwright.ir.errors import InputError
from graphwright.ir.taps import Tapped
from graphwright.passes.distillation import losses


@dataclass(frozen=True, kw_only=True)
class Term(ABC):
    """One term: a function of what student and teacher give and of the batch.

    Subclasses may be made anywhere; a plain function of the same three arguments serves as well.

    Attributes:
        weight: what the term is multiplied by.
        mask: which entry of the batch ``[batch, length]`` says by zeros what is padding; a batch without it has none.
    """

    needs_teacher: ClassVar[bool] = True

    weight: float = 1.0
    mask: str = "attention_mask"

    def __post_init__(self) -> None:
        number = isinstance(self.weight, int | float) and not isinstance(self.weight, bool)
        if not number or not 0 <= self.weight < float("inf"):
            raise InputError(f"must be a number from 0, not {self.weight!r}", where=f"{type(self).__name__}: weight")

    @abstractmethod
    def __call__(self, student: Tapped, teacher: Tapped | None, batch: Mapping[str, Any]) -> torch.Tensor:
        """The term without its weight, a scalar.

        Raises:
            InputError: the outputs or the batch lack what it needs.
        """

    def padding(self, batch: Mapping[str, Any]) -> torch.Tensor | None:
        """The mask of a batch."""
        found = batch.get(self.mask)
        return found if isinstance(found, torch.Tensor) else None


@dataclass(frozen=True, kw_only=True)
class TaskLoss(Term):
    """The loss that the student itself gives, when it was traced with labels."""

    needs_teacher: ClassVar[bool] = False

    def __call__(self, student: Tapped, teacher: Tapped | None, batch: Mapping[str, Any]) -> torch.Tensor:
        """The student's output ``loss``."""
        found = _part(student.output, "loss")
        if not isinstance(found, torch.Tensor):
            raise InputError("the student gives no 'loss'", where="TaskLoss", hint="trace the model with labels")
        return found


@dataclass(frozen=True, kw_only=True)
class CrossEntropy(Term):
    """Cross entropy of the student's logits; see :func:`.cross_entropy`.

    Attributes:
        causal: the labels are the tokens themselves, and each is foretold by those before it. Without labels in the
            batch they are its ``input_ids``, padding left out.
        labels: which entry of the batch has them; -100 is left out.
    """

    needs_teacher: ClassVar[bool] = False

    causal: bool = False
    labels: str = "labels"

    def __call__(self, student: Tapped, teacher: Tapped | None, batch: Mapping[str, Any]) -> torch.Tensor:
        """Of logits ``[batch, classes]`` or ``[batch, length, classes]``."""
        logits, labels = logits_of(student, "student"), batch.get(self.labels)
        if labels is None and self.causal:
            labels, padding = batch.get("input_ids"), self.padding(batch)
            if labels is not None and padding is not None:
                labels = labels.masked_fill(padding == 0, losses.IGNORED)
        if labels is None:
            raise InputError(f"a batch has no {self.labels!r}", where="CrossEntropy", hint="name them with labels=")
        if self.causal:
            return losses.cross_entropy(logits[:, :-1], labels[:, 1:])
        return losses.cross_entropy(logits, labels)


@dataclass(frozen=True, kw_only=True)
class KLDivergence(Term):
    """Divergence of the student's predictions from the teacher's; see :func:`.kl_divergence`.

    Attributes:
        temperature: above 0.
    """

    temperature: float = 1.0

    def __call__(self, student: Tapped, teacher: Tapped | None, batch: Mapping[str, Any]) -> torch.Tensor:
        """Of the logits; padding is left out where there is a row for each position."""
        assert teacher is not None
        mine, goal = logits_of(student, "student"), logits_of(teacher, "teacher")
        padding = self.padding(batch) if mine.dim() > 2 else None
        return losses.kl_divergence(mine, goal, padding, self.temperature)


@dataclass(frozen=True, kw_only=True)
class SquareHead(Term):
    """Relative squared error of the features of every layer; see :func:`.square_head`."""

    def __call__(self, student: Tapped, teacher: Tapped | None, batch: Mapping[str, Any]) -> torch.Tensor:
        """Of all tapped layers."""
        assert teacher is not None
        if student.features.keys() != teacher.features.keys():
            raise InputError(
                f"the student's layers are {', '.join(student.features)}, the teacher's {', '.join(teacher.features)}",
                where="SquareHead",
                hint="tap the same layers of both with TapFeatures(where=...)",
            )
        return losses.square_head(list(student.features.values()), list(teacher.features.values()), self.padding(batch))


@dataclass(frozen=True, kw_only=True)
class HiddenCosine(Term):
    """Direction of the last layer's hidden states; see :func:`.hidden_cosine`."""

    def __call__(self, student: Tapped, teacher: Tapped | None, batch: Mapping[str, Any]) -> torch.Tensor:
        """Of the last tapped layer."""
        assert teacher is not None
        return losses.hidden_cosine(_last(student), _last(teacher), self.padding(batch))


@dataclass(frozen=True, kw_only=True)
class NearestNeighbours(Term):
    """Distance to the nearest teacher features of the same class; see :func:`.nearest_neighbours`.

    Attributes:
        k: neighbours.
        pool: a sample's feature is the mean of the last tapped layer over its positions, or the first of them.
        labels: which entry of the batch has the classes.
    """

    k: int = 1
    pool: Literal["mean", "first"] = "mean"
    labels: str = "labels"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pool not in ("mean", "first"):
            raise InputError(f"must be 'mean' or 'first', not {self.pool!r}", where="NearestNeighbours: pool")

    def __call__(self, student: Tapped, teacher: Tapped | None, batch: Mapping[str, Any]) -> torch.Tensor:
        """Of the last tapped layer."""
        assert teacher is not None
        if self.labels not in batch:
            raise InputError(f"a batch has no {self.labels!r}", where="NearestNeighbours", hint="name them: labels=")
        mine, goal = (self._pooled(_last(each), batch) for each in (student, teacher))
        return losses.nearest_neighbours(mine, goal, batch[self.labels], self.k)

    def _pooled(self, features: torch.Tensor, batch: Mapping[str, Any]) -> torch.Tensor:
        if features.dim() == 2:
            return features
        if self.pool == "first":
            return features[:, 0]
        padding = self.padding(batch)
        if padding is None:
            return features.mean(1)
        kept = (padding != 0).unsqueeze(-1)
        return features.masked_fill(~kept, 0).sum(1) / kept.sum(1)


def class_distillation(k: int = 1, feature_weight: float = 0.01, *, temperature: float = 5.0) -> tuple[Term, ...]:
    """``α1 L_hid + α2 L_soft + α3 L_CE`` of class-based feature distillation, with α2 = α3 = 0.5.

    Saadi et al.; they try k in 1, 2, 3, 5 and α1 in 0.1, 0.01, 0.001, at temperature 5.

    Args:
        k: neighbours of each sample.
        feature_weight: α1.
        temperature: of ``L_soft``.
    """
    return (
        NearestNeighbours(weight=feature_weight, k=k),
        KLDivergence(weight=0.5, temperature=temperature),
        CrossEntropy(weight=0.5),
    )


def logits_of(given: Tapped, whose: str) -> torch.Tensor:
    """The logits among what a program gives, or its one floating-point tensor.

    Raises:
        InputError: there are none.
    """
    found = given.output if isinstance(given.output, torch.Tensor) else _part(given.output, "logits")
    if not isinstance(found, torch.Tensor) or not found.is_floating_point():
        raise InputError(
            f"the {whose} gives no 'logits'", where="distill", hint="compare features: SquareHead(), HiddenCosine()"
        )
    return found


def _part(output: Any, name: str) -> Any:
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


def _last(given: Tapped) -> torch.Tensor:
    if not given.features:
        raise InputError("no layer is tapped", where="distill", hint="run TapFeatures on student and teacher")
    return list(given.features.values())[-1]
