"""What a program with taps gives: its output, and values from within beside it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

# What the name of an output that is a tap begins with; the module path of its layer follows.
PREFIX = "features."


@dataclass(frozen=True)
class Tapped:
    """The output of a program with taps; its attributes and items are those of the output without them.

    Attributes:
        output: what the program gives without taps.
        features: values from within, by module path, in order.
    """

    output: Any
    features: dict[str, torch.Tensor]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "output":
            raise AttributeError(name)
        return getattr(self.output, name)

    def __getitem__(self, key: Any) -> Any:
        return self.output[key]


def differ_by_taps(before: Sequence[str], after: Sequence[str]) -> bool:
    """Whether of two lists of outputs one is the other with taps behind it."""
    both = min(len(before), len(after))
    rest = (*before[both:], *after[both:])
    return bool(rest) and before[:both] == after[:both] and all(name.startswith(PREFIX) for name in rest)


def _apart(value: Tapped) -> tuple[list[Any], list[str]]:
    return [value.output, *value.features.values()], list(value.features)


def _apart_with_names(value: Tapped) -> tuple[list[tuple[Any, Any]], list[str]]:
    # The output's parts keep the names that they have without taps.
    named: list[tuple[Any, Any]] = [(pytree.MappingKey(PREFIX + path), each) for path, each in value.features.items()]
    return [(pytree.MappingKey(""), value.output), *named], list(value.features)


def _together(children: Iterable[Any], paths: list[str]) -> Tapped:
    output, *features = children
    return Tapped(output, dict(zip(paths, features, strict=True)))


pytree.register_pytree_node(
    Tapped,
    _apart,
    _together,
    serialized_type_name="graphwright.ir.taps.Tapped",
    flatten_with_keys_fn=_apart_with_names,
)
