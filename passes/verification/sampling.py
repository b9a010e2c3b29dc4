"""Fresh random inputs that fit a program: token ids in the vocabulary, masks with padding, other sizes."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Mapping

import torch
from torch import fx

from graphwright.ir.arguments import argument
from graphwright.ir.conditions import holds
from graphwright.ir.decoder import DecoderLayout, draw_step
from graphwright.ir.errors import InputError
from graphwright.ir.names import op_name
from graphwright.ir.program import Program
from graphwright.ir.types import Dim, TensorType

# Operators that only move the values of their operand; followed to find what an input is used for.
_MOVES = (
    "view",
    "reshape",
    "expand",
    "unsqueeze",
    "squeeze",
    "slice",
    "to",
    "_to_copy",
    "contiguous",
    "clone",
    "transpose",
)

# Sizes of a decoding step: enough slots for the batch, enough capacity for the tokens.
_STEP = {"batch": (2, 1, 3), "tokens": (9, 1, 5), "selected": (4, 1, 2), "slots": (5, 1, 4), "capacity": (17, 1, 13)}

# How far from the wanted size of a dimension one that meets the program's conditions is looked for.
_SEARCHED = 9


def small_sizes(program: Program, variant: int = 0) -> dict[str, int]:
    """Small sizes for every dimension, differing by variant, within the program's limits and conditions.

    Variant 1 takes 1 for every dimension that may be 1: what a rewrite does to a single row or token shows only there.
    """
    bases = _STEP if DecoderLayout.find(program) is not None else {"batch": (2, 1, 3), "sequence": (9, 1, 13)}
    wanted: list[int] = []
    for index, dim in enumerate(program.dims.values()):
        choice = bases.get(dim.name, (5 + index, 1, 4 + index))[variant % 3]
        wanted.append(min(max(choice, dim.min), dim.max if dim.max is not None else choice))
    dims = list(program.dims.values())
    for sizes in itertools.product(*(_nearby(dim, size) for dim, size in zip(dims, wanted, strict=True))):
        named = {dim.name: size for dim, size in zip(dims, sizes, strict=True)}
        if all(holds(condition, named) for condition in program.symbols.conditions):
            return named
    return {dim.name: dim.hint for dim in dims}


def _nearby(dim: Dim, size: int) -> list[int]:
    """A size, and those around it that the dimension admits."""
    around = [size] + [size + sign * step for step in range(1, _SEARCHED) for sign in (1, -1)]
    return [candidate for candidate in around if candidate >= 1 and dim.admits(candidate)] or [dim.hint]


def sample(
    program: Program, examples: list[torch.Tensor], sizes: Mapping[str, int], generator: torch.Generator
) -> list[torch.Tensor]:
    """Random inputs of the given sizes, like the examples in kind.

    Floats are normal with the example's mean and spread; token ids are drawn from the whole vocabulary; a 0/1 integer
    or boolean matrix is taken for a padding mask and gets a random number of valid positions per row, at least one;
    other integers are drawn from the example's range. A decoding step gets slots, starts and rows that fit together.
    """
    if DecoderLayout.find(program) is not None:
        return draw_step(program, sizes, generator, vocabulary=vocabulary(program, program.inputs[0]))
    inputs: list[torch.Tensor] = []
    for node, example in zip(program.inputs, examples, strict=True):
        kind = program.type_of(node)
        if not isinstance(kind, TensorType):
            raise InputError("is not a tensor", where=f"input {node.target!r}")
        shape = tuple(size if isinstance(size, int) else sizes[size] for size in kind.shape)
        inputs.append(_draw(node, kind, shape, example, program, generator))
    return inputs


def _draw(
    node: fx.Node,
    kind: TensorType,
    shape: tuple[int, ...],
    example: torch.Tensor,
    program: Program,
    generator: torch.Generator,
) -> torch.Tensor:
    if kind.dtype.is_floating_point:
        finite = example.detach().double()
        finite = finite[torch.isfinite(finite)]
        mean = float(finite.mean()) if finite.numel() else 0.0
        spread = float(finite.std(correction=0)) if finite.numel() > 1 else 0.0
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * (spread or 1.0) + mean).to(kind.dtype)
    if kind.dtype.is_complex:
        return torch.randn(shape, generator=generator, dtype=torch.complex128).to(kind.dtype)
    rows = vocabulary(program, node)
    if rows is None and _is_mask(example) and len(shape) == 2:
        lengths = torch.randint(1, shape[1] + 1, (shape[0], 1), generator=generator)
        lengths[0] = shape[1]  # one row without padding, so that every position is exercised
        return (torch.arange(shape[1]).unsqueeze(0) < lengths).to(kind.dtype)
    if kind.dtype == torch.bool:
        return torch.rand(shape, generator=generator) < 0.5
    low = int(example.min()) if example.numel() else 0
    high = int(example.max()) + 1 if example.numel() else 2
    if rows is not None:
        low, high = 0, rows
    return torch.randint(low, max(high, low + 1), shape, generator=generator).to(kind.dtype)


def _is_mask(example: torch.Tensor) -> bool:
    return example.dtype == torch.bool or (example.numel() > 0 and bool(((example == 0) | (example == 1)).all()))


def vocabulary(program: Program, node: fx.Node) -> int | None:
    """Rows of the smallest embedding table this input indexes, or ``None`` if it indexes none."""
    found: list[int] = []
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        for user in current.users:
            name = op_name(user)
            if name == "aten.embedding" and argument(user, "indices") is current:
                kind = program.type_of(argument(user, "weight"))
                if isinstance(kind, TensorType) and isinstance(kind.shape[0], int):
                    found.append(kind.shape[0])
            elif name == "graphwright.embedding_nbits" and argument(user, "indices") is current:
                kind = program.type_of(argument(user, "qweight"))
                if isinstance(kind, TensorType) and isinstance(kind.shape[0], int):
                    found.append(kind.shape[0])
            elif user not in seen and (
                name.split(".")[-1 if name.count(".") == 1 else 1] in _MOVES or user.target is operator.getitem
            ):
                seen.add(user)
                stack.append(user)
    return min(found) if found else None
