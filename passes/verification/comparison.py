"""Errors between two values: never scaled by size, never blind to NaN."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

# A last dimension at least this wide in an output called logits, or of a language model, is compared as distributions.
_VOCABULARY = 1000


@dataclass(frozen=True)
class Difference:
    """How far a value is from its reference.

    Attributes:
        worst: largest absolute difference over the root mean square of the reference; ``inf`` when shapes, dtypes'
            kinds, integers, or the places of NaN and infinities differ.
        relative: root mean square of the difference over that of the reference.
        cosine: cosine similarity of the two, flattened.
        sqnr_db: signal to quantisation noise ratio, ``20 log10(1 / relative)``.
        reason: what differs when ``worst`` is infinite.
    """

    worst: float
    relative: float
    cosine: float
    sqnr_db: float
    reason: str = ""

    def as_json(self) -> dict[str, Any]:
        """JSON values; infinities become strings."""
        return {
            key: value if not isinstance(value, float) or math.isfinite(value) else str(value)
            for key, value in asdict(self).items()
        }


IDENTICAL = Difference(0.0, 0.0, 1.0, math.inf)


def _unlike(reason: str) -> Difference:
    return Difference(math.inf, math.inf, 0.0, -math.inf, reason)


def compare(value: Any, reference: Any) -> Difference:
    """Compare two values of any kind: tensors, numbers, nested sequences."""
    if isinstance(reference, tuple | list):
        if not isinstance(value, tuple | list) or len(value) != len(reference):
            return _unlike("the number of results differs")
        return worst_of([compare(a, b) for a, b in zip(value, reference, strict=True)])
    if not isinstance(reference, torch.Tensor) or not isinstance(value, torch.Tensor):
        same = type(value) is type(reference) and value == reference
        return IDENTICAL if same else _unlike(f"{value!r} instead of {reference!r}")
    if value.shape != reference.shape:
        return _unlike(f"shape {list(value.shape)} instead of {list(reference.shape)}")
    if value.is_floating_point() != reference.is_floating_point():
        return _unlike(f"dtype {value.dtype} instead of {reference.dtype}")
    if not reference.is_floating_point() or reference.numel() == 0:
        count = int((value != reference).sum())
        return IDENTICAL if count == 0 else _unlike(f"{count} of {reference.numel()} elements differ")
    return _compare_floats(value.detach().double(), reference.detach().double())


def _compare_floats(value: torch.Tensor, reference: torch.Tensor) -> Difference:
    finite = torch.isfinite(reference)
    if not bool(finite.all()) or not bool(torch.isfinite(value).all()):
        same_place = torch.equal(torch.isfinite(value), finite) and torch.equal(
            torch.isnan(value), torch.isnan(reference)
        )
        if not same_place or not torch.equal(value[value.isinf()], reference[reference.isinf()]):
            return _unlike("NaN or infinity in other places")
        value, reference = value[finite], reference[finite]
        if reference.numel() == 0:
            return IDENTICAL
    difference = value - reference
    worst = float(difference.abs().max())
    if worst == 0.0:
        return IDENTICAL
    size = float(reference.pow(2).mean().sqrt())
    if size == 0.0:
        return _unlike("not zero as the reference is")
    relative = float(difference.pow(2).mean().sqrt()) / size
    norm = float(value.norm()) * float(reference.norm())
    cosine = float((value * reference).sum()) / norm if norm > 0 else 0.0
    return Difference(worst / size, relative, cosine, -20 * math.log10(relative) if relative > 0 else math.inf)


def worst_of(items: list[Difference]) -> Difference:
    """The largest of several differences."""
    return max(items, key=lambda item: item.worst, default=IDENTICAL)


def compare_logits(value: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
    """Mean ``KL(reference ‖ value)`` in nats and top-1 agreement over the last dimension."""
    p = torch.log_softmax(reference.detach().double(), dim=-1)
    q = torch.log_softmax(value.detach().double(), dim=-1)
    divergence = (p.exp() * (p - q)).sum(-1).mean()
    agreement = (value.argmax(-1) == reference.argmax(-1)).double().mean()
    return {"kl": float(divergence), "top1_agreement": float(agreement)}


def is_logits(name: str, value: Any) -> bool:
    """Whether an output is compared as distributions as well."""
    return (
        isinstance(value, torch.Tensor)
        and value.is_floating_point()
        and value.dim() >= 2
        and ((name.endswith("logits") and value.shape[-1] > 1) or value.shape[-1] >= _VOCABULARY)
    )
