"""What a search is to reach: a quality, and limits on bytes and time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from graphwright.ir.errors import InputError


def _check(value: object, where: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise InputError(f"must be a number of at least 0, not {value!r}", where=where)


@dataclass(frozen=True)
class Relative:
    """The score may worsen by a fraction of the original's: ``Relative(0.01)`` is one per cent.

    Attributes:
        most: the fraction.
    """

    most: float = 0.01

    def __post_init__(self) -> None:
        _check(self.most, "Relative")

    def loss(self, score: float, original: float, *, higher_is_better: bool) -> float:
        """By which fraction a score is worse than the original's; negative where it is better."""
        worse = original - score if higher_is_better else score - original
        return worse / abs(original)

    def check(self, original: float) -> None:
        """Check that there is something to be relative to.

        Raises:
            InputError: the original scores 0.
        """
        if original == 0.0:
            raise InputError("the original model scores 0", where="Relative", hint="use target=Absolute(...)")

    def shown(self, loss: float) -> str:
        """A loss in words."""
        return f"{100 * loss:.3g} %"


@dataclass(frozen=True)
class Absolute:
    """The score may worsen by a number.

    Attributes:
        most: the number.
    """

    most: float

    def __post_init__(self) -> None:
        _check(self.most, "Absolute")

    def loss(self, score: float, original: float, *, higher_is_better: bool) -> float:
        """By how much a score is worse than the original's; negative where it is better."""
        return original - score if higher_is_better else score - original

    def check(self, original: float) -> None:
        """Any score of the original will do."""

    def shown(self, loss: float) -> str:
        """A loss in words."""
        return f"{loss:.3g}"


Target = Relative | Absolute


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a result may take.

    Attributes:
        bytes: of all weights as they are stored, those that stay in floating point included.
        latency_ms: median milliseconds of a call on the target.
        target: what runs the model while it is judged, see :func:`graphwright.optimize`; by default ``cpu`` where its
            kernels are installed, else ``reference``.
        inputs: of the call whose latency is measured; by default the example inputs.
        kernels: every quantised linear must run in a kernel of the target, not in the reference (nothing to ask of the
            target ``reference``).
    """

    bytes: int | None = None
    latency_ms: float | None = None
    target: Any = None
    inputs: Any = None
    kernels: bool = True

    def __post_init__(self) -> None:
        for name in ("bytes", "latency_ms"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not value > 0):
                raise InputError(f"must be a positive number, not {value!r}", where=f"Limits.{name}")
