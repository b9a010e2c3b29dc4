"""Inputs from before passes added some, completed."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from graphwright.ir.errors import InputError
from graphwright.ir.program import Program
from graphwright.ir.types import TensorType


def completed(program: Program, flat: Sequence[torch.Tensor], names: Sequence[str] | None = None) -> list[torch.Tensor]:
    """Flat inputs from before passes added some, with those that make no difference in their places.

    Args:
        program: what takes them.
        flat: the inputs that there were.
        names: of these in the graph, where passes have added inputs between them or taken some away; otherwise they
            are the first ones.

    Raises:
        InputError: what they are is not known, as after a load.
    """
    names = [node.name for node in program.inputs[: len(flat)]] if names is None else names
    known, found, sizes = dict(zip(names, flat, strict=True)), list[torch.Tensor](), dict[str, int]()
    for node in program.inputs:
        value, kind = known.get(node.name), program.type_of(node)
        if value is None:
            continue
        assert isinstance(kind, TensorType)
        sizes |= {dim: size for dim, size in zip(kind.shape, value.shape, strict=True) if isinstance(dim, str)}
    for node in program.inputs:
        if node.name in known:
            found.append(known[node.name])
            continue
        stand_in, kind = program.kept.get("inputs", {}).get(node.name), program.type_of(node)
        if stand_in is None or not isinstance(kind, TensorType):
            raise InputError("is missing", where=f"input {node.target!r}", hint="give it among the inputs")
        if not isinstance(stand_in, torch.Tensor):
            shape = [sizes[size] if isinstance(size, str) else size for size in kind.shape]
            stand_in = torch.full(shape, stand_in, dtype=kind.dtype)
        found.append(stand_in)
    return found
