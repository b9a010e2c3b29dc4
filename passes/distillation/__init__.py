"""Recovery: a changed program learns from the one that it was made of."""

from graphwright.passes.distillation.loop import Distilled, distill
from graphwright.passes.distillation.losses import (
    cross_entropy,
    hidden_cosine,
    kl_divergence,
    nearest_neighbours,
    square_head,
)
from graphwright.passes.distillation.taps import RemoveTaps, TapFeatures
from graphwright.passes.distillation.teacher import teacher_of
from graphwright.passes.distillation.terms import (
    CrossEntropy,
    HiddenCosine,
    KLDivergence,
    NearestNeighbours,
    SquareHead,
    TaskLoss,
    Term,
    class_distillation,
)

__all__ = [
    "CrossEntropy",
    "Distilled",
    "HiddenCosine",
    "KLDivergence",
    "NearestNeighbours",
    "RemoveTaps",
    "SquareHead",
    "TapFeatures",
    "TaskLoss",
    "Term",
    "class_distillation",
    "cross_entropy",
    "distill",
    "hidden_cosine",
    "kl_divergence",
    "nearest_neighbours",
    "square_head",
    "teacher_of",
]
