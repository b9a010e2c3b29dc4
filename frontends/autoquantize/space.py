"""Recipes that a search may try."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from graphwright.ir.errors import InputError
from graphwright.passes.base import Pass
from graphwright.passes.quantization import QuantizeLinears
from graphwright.passes.quantization.overrides import Override
from graphwright.passes.quantization.rounding import BlockRounding, InputRounding, rounding_of
from graphwright.passes.selection import Where


@dataclass(frozen=True)
class Choice:
    """One recipe: how linears are quantised, as JSON values.

    Attributes:
        bits, group_size, symmetric, activations, rounding: as :class:`QuantizeLinears` takes them.
        transform: name of the passes of the space that run before.
        overrides: linears that are treated otherwise, by weight name.
        label: in words.
    """

    bits: int
    group_size: int | None
    symmetric: bool
    rounding: str
    activations: str = "none"
    transform: str = ""
    overrides: Mapping[str, Override] = field(default_factory=dict)
    note: str = ""

    @property
    def form(self) -> dict[str, Any]:
        """The format of most linears, as ``overrides`` takes it."""
        return {"bits": self.bits, "group_size": self.group_size, "symmetric": self.symmetric}

    @property
    def label(self) -> str:
        """In words: ``INT4 g32 asymmetric gptq, 3 linears in 8 bits``."""
        group = "per channel" if self.group_size is None else f"g{self.group_size}"
        words = [f"INT{self.bits}", group, *([] if self.symmetric else ["asymmetric"]), self.rounding]
        words += ["INT8 activations"] if self.activations == "int8" else []
        words += [f"after {self.transform}"] if self.transform else []
        return " ".join(words) + (f", {self.note}" if self.note else "")

    def as_dict(self) -> dict[str, Any]:
        """JSON values that tell it from every other choice."""
        return {
            **self.form,
            "rounding": self.rounding,
            "activations": self.activations,
            "transform": self.transform,
            "overrides": {key: None if value is None else dict(value) for key, value in self.overrides.items()},
            "note": self.note,
        }


@dataclass(frozen=True, kw_only=True)
class SearchSpace:
    """What a search may choose from; it tries what is smallest first, and of that what is cheapest.

    Attributes:
        bits, group_sizes, symmetric, activations: of :class:`QuantizeLinears`. INT8 activations go with symmetric
            INT8 weights per channel, which they bring along.
        methods: roundings by name, the cheapest first; without calibration data those that need it are left out.
        transforms: exact passes to run before, by name, such as ``{"awq": [...]}``; the empty name stands for none.
        finer: what becomes of the most sensitive linears where all in one format lose too much; ``None`` leaves them in
            floating point. With INT8 activations those with the highest kurtosis of the input stay in floating point.
        passes: passes that run before every recipe, once.
        finish: passes that run after every recipe, such as ``QuantizeEmbeddings()``.
        where, ignore, lm_head: which linears.
    """

    bits: Sequence[int] = (4, 8)
    group_sizes: Sequence[int | None] = (128, 32)
    symmetric: Sequence[bool] = (True, False)
    methods: Sequence[str] = ("nearest", "gptq")
    activations: Sequence[str] = ("none",)
    transforms: Mapping[str, Sequence[Pass]] = field(default_factory=lambda: {"": ()})
    finer: Override = field(default_factory=lambda: {"bits": 8, "group_size": 128, "symmetric": True})
    passes: Sequence[Pass] | None = None
    finish: Sequence[Pass] = ()
    where: Where = None
    ignore: Where = None
    lm_head: bool = False

    def __post_init__(self) -> None:
        for name in ("bits", "group_sizes", "symmetric", "methods", "activations", "transforms"):
            value = getattr(self, name)
            if isinstance(value, str) or not value:
                raise InputError(f"must be a list of what may be tried, not {value!r}", where=f"SearchSpace.{name}")
        for method in self.methods:
            rounding_of(method, where="SearchSpace.methods")
        for choice in self.families(has_data=True):
            if choice.activations != "int8":
                QuantizeLinears(**choice.form)

    def methods_with(self, *, has_data: bool) -> list[str]:
        """The roundings that can be used."""
        found = []
        for name in self.methods:
            method = rounding_of(name, where="SearchSpace.methods")
            if has_data or not isinstance(method, InputRounding | BlockRounding):
                found.append(name)
        return found

    def families(self, *, has_data: bool) -> list[Choice]:
        """Every format, with the first rounding there is."""
        methods = self.methods_with(has_data=has_data)
        if not methods:
            raise InputError(
                "all need calibration data", where="SearchSpace.methods", hint="give calibration=, or add 'nearest'"
            )
        found: list[Choice] = []
        for activations, transform in itertools.product(self.activations, self.transforms):
            if activations == "int8":
                found.append(Choice(8, None, True, methods[0], "int8", transform))
                continue
            found += [
                Choice(bits, group, symmetric, methods[0], activations, transform)
                for bits, group, symmetric in itertools.product(self.bits, self.group_sizes, self.symmetric)
            ]
        return found

    def passes_of(self, choice: Choice, calibration: Iterable[Any] | None) -> list[Pass]:
        """The passes of a choice; without those that run before every recipe."""
        quantize = QuantizeLinears(
            bits=choice.bits,
            group_size=choice.group_size,
            symmetric=choice.symmetric,
            activations=choice.activations,
            rounding=choice.rounding,
            calibration=calibration,
            overrides=choice.overrides,
            where=self.where,
            ignore=self.ignore,
            lm_head=self.lm_head,
        )
        return [*self.transforms[choice.transform], quantize, *self.finish]
