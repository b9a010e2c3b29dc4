"""Inputs from before passes added some, completed."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from graphwright.ir.errors import InputError
from graphwright.ir.program import Program
from graphwright.ir.types import TensorType


def completed(program: Program, flat: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Flat inputs from before passes added some, with those that make no difference behind them.

    Raises:
        InputError: what they are is not known, as after a load.
    """
    found, sizes = list(flat), dict[str, int]()
    for node, value in zip(program.inputs, flat, strict=False):
        kind = program.type_of(node)
        assert isinstance(kind, TensorType)
        sizes |= {dim: size for dim, size in zip(kind.shape, value.shape, strict=True) if isinstance(dim, str)}
    for node in program.inputs[len(found) :]:
        stand_in, kind = program.kept.get("inputs", {}).get(node.name), program.type_of(node)
        if stand_in is None or not isinstance(kind, TensorType):
            raise InputError("is missing", where=f"input {node.target!r}", hint="give it among the inputs")
        if not isinstance(stand_in, torch.Tensor):
            shape = [sizes[size] if isinstance(size, str) else size for size in kind.shape]
            stand_in = torch.full(shape, stand_in, dtype=kind.dtype)
        found.append(stand_in)
    return found
