"""Calibration data as people have it, and as a program takes it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import torch

from graphwright.ir.decoder import DecoderLayout
from graphwright.ir.errors import GraphwrightError, InputError
from graphwright.ir.program import Program
from graphwright.passes.calibration.steps import first_step

Batch = Mapping[str, Any] | Sequence[Any] | torch.Tensor


@dataclass(frozen=True)
class CalibrationData:
    """Items of a dataset, made into batches as they are needed.

    Attributes:
        items: a list, a ``DataLoader``, a dataset with ``__iter__`` or with ``__len__`` and ``__getitem__``, or an
            iterator, which is read at once, as passes may need the data more than once.
        transform: makes a batch of an item: a mapping, a sequence of arguments or one tensor. ``None`` where items are
            batches already.
        limit: how many items are used; ``None`` for all.
    """

    items: Iterable[Any]
    transform: Callable[[Any], Batch] | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.items, Mapping | torch.Tensor):
            raise InputError(
                f"is one batch (a {type(self.items).__name__}), not several", where="calibration", hint="give [batch]"
            )
        if isinstance(self.items, str | bytes) or not (isinstance(self.items, Iterable) or _is_indexed(self.items)):
            raise InputError(
                f"must be batches, not a {type(self.items).__name__}",
                where="calibration",
                hint="give a list of batches, a DataLoader, or CalibrationData(dataset, transform=...)",
            )
        wrong = isinstance(self.limit, bool) or not isinstance(self.limit, int) or self.limit < 1
        if self.limit is not None and wrong:
            raise InputError(f"must be at least 1, not {self.limit!r}", where="calibration: limit")
        if self.transform is not None and not callable(self.transform):
            raise InputError(f"must be a function, not {self.transform!r}", where="calibration: transform")
        if isinstance(self.items, Iterator):  # gone after one use
            object.__setattr__(self, "items", tuple(self._items()))

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

    def as_option(self) -> str:
        """In recipes and reports data stands in words."""
        return str(self)

    def __iter__(self) -> Iterator[Batch]:
        """The batches.

        Raises:
            InputError: an item cannot be read, or the transform raised; the item is numbered.
        """
        for index, item in enumerate(self._items()):
            if self.transform is None:
                yield item
                continue
            try:
                made = self.transform(item)
            except Exception as error:  # the caller's code: whatever it raises, say on which item
                raise InputError(
                    f"the transform raised {_said(error)}", where=f"calibration item {index + 1}"
                ) from error
            yield made

    def _items(self) -> Iterator[Any]:
        # The data sets of torch need not say where they end, except by their length.
        given: Any = self.items
        items = iter(given) if isinstance(given, Iterable) else (given[index] for index in range(len(given)))
        for index in itertools.count() if self.limit is None else range(self.limit):
            try:
                item = next(items)
            except StopIteration:
                return
            except Exception as error:  # the caller's code
                raise InputError(f"cannot be read: {_said(error)}", where=f"calibration item {index + 1}") from error
            yield item


def _is_indexed(items: Any) -> bool:
    return hasattr(items, "__len__") and hasattr(items, "__getitem__")


def _said(error: Exception) -> str:
    text = error.what if isinstance(error, GraphwrightError) else str(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def flatten(
    program: Program, batch: Batch, index: int, decoder: DecoderLayout | None = None
) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """The inputs of one batch in the program's order.

    Args:
        program: what takes them.
        batch: arguments of a call; for a decoding step token ids will do, ``[B, S]``, by themselves or as
            ``{"input_ids": ..., "attention_mask": ...}``: a step from empty caches.
        index: its number less one, for messages.
        decoder: the program's layout if it is a decoding step.

    Returns:
        the inputs, and for token ids taken as a step the mask ``[B, S]``, bool, of what is no padding.

    Raises:
        InputError: the batch does not fit the program or holds NaN or infinity; it is numbered.
    """
    where = f"calibration batch {index + 1}"
    mask: torch.Tensor | None = None
    try:
        if decoder is not None and isinstance(batch, torch.Tensor):
            flat, mask = first_step(program, decoder, {"input_ids": batch})
        elif decoder is not None and isinstance(batch, Mapping) and "slots" not in batch and "input_ids" in batch:
            flat, mask = first_step(program, decoder, batch)
        elif isinstance(batch, torch.Tensor):
            flat = program.signature.flatten((batch,), {})
        elif isinstance(batch, Mapping):
            flat = program.signature.flatten((), dict(batch))
        elif isinstance(batch, Sequence) and not isinstance(batch, str | bytes):
            flat = program.signature.flatten(tuple(batch), {})
        else:
            raise InputError(f"is a {type(batch).__name__}", hint="give mappings, sequences or tensors")
        program.check_inputs(flat)
    except InputError as error:
        raise InputError(f"{where} does not fit: {error.what}", where=error.where, hint=error.hint) from error
    for name, value in zip(program.signature.names, flat, strict=True):
        # A mask that is added to scores has minus infinity in it.
        wrong = torch.isnan(value) if "mask" in name else ~torch.isfinite(value)
        if bool(wrong.any()):
            raise InputError("holds NaN or infinity", where=f"{where}, input {name!r}")
    return flat, mask
