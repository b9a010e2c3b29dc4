"""Calibration data as people have it, and as a program takes it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import torch

from graphwright.ir.errors import InputError
from graphwright.ir.program import Program

Batch = Mapping[str, Any] | Sequence[Any] | torch.Tensor


@dataclass(frozen=True)
class CalibrationData:
    """Items of a dataset, made into batches as they are needed.

    Attributes:
        items: anything that can be gone through more than once: a list, a ``DataLoader``, a dataset.
        transform: makes a batch of an item: a mapping, a sequence of arguments or one tensor. ``None`` where items are
            batches already.
        limit: how many items are used; ``None`` for all.
    """

    items: Iterable[Any]
    transform: Callable[[Any], Batch] | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.items, str | bytes) or not isinstance(self.items, Iterable):
            raise InputError(
                f"must be batches, not a {type(self.items).__name__}",
                where="calibration",
                hint="give a list of batches, a DataLoader, or CalibrationData(dataset, transform=...)",
            )
        if self.limit is not None and (isinstance(self.limit, bool) or self.limit < 1):
            raise InputError(f"must be at least 1, not {self.limit!r}", where="calibration: limit")
        if isinstance(self.items, Iterator):  # gone after one use, and passes need the data several times
            object.__setattr__(self, "items", tuple(itertools.islice(self.items, self.limit)))

    @classmethod
    def of(cls, given: Iterable[Any]) -> CalibrationData:
        """What a user gave as calibration data."""
        return given if isinstance(given, CalibrationData) else cls(given)

    def __str__(self) -> str:
        """``16 batches``, or what they come from."""
        if isinstance(self.items, Sized) and self.transform is None:
            count = len(self.items) if self.limit is None else min(self.limit, len(self.items))
            return f"{count} batches"
        return f"{self.limit or 'all'} items of {type(self.items).__name__}"

    def __iter__(self) -> Iterator[Batch]:
        for item in itertools.islice(iter(self.items), self.limit):
            yield self.transform(item) if self.transform is not None else item


def flatten(program: Program, batch: Batch, index: int) -> list[torch.Tensor]:
    """The inputs of one batch in the program's order.

    Raises:
        InputError: the batch does not fit the program or holds NaN or infinity; it is numbered.
    """
    try:
        if isinstance(batch, torch.Tensor):
            flat = program.signature.flatten((batch,), {})
        elif isinstance(batch, Mapping):
            flat = program.signature.flatten((), dict(batch))
        elif isinstance(batch, Sequence) and not isinstance(batch, str):
            flat = program.signature.flatten(tuple(batch), {})
        else:
            raise InputError(f"is a {type(batch).__name__}", hint="give mappings, sequences or tensors")
        program.check_inputs(flat)
    except InputError as error:
        raise InputError(f"calibration batch {index + 1} does not fit: {error}") from error
    for name, value in zip(program.signature.names, flat, strict=True):
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise InputError("holds NaN or infinity", where=f"calibration batch {index + 1}, input {name!r}")
    return flat
