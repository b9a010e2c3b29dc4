"""What makes a program a decoding step: its inputs and outputs by name, and the caches between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphwright.ir.arguments import argument
from graphwright.ir.errors import InputError, ProgramError
from graphwright.ir.names import op_name
from graphwright.ir.program import Program
from graphwright.ir.types import VAL, TensorType, fake_of

_FIRST = ("input_ids", "slots", "starts", "rows")

# The input behind the caches of a step whose adapters are switched as it runs.
ADAPTER_WEIGHTS = "adapter_weights"

# operator that looks rows up -> the operand that has them
_TABLES = {"aten.embedding": "weight", "graphwright.embedding_nbits": "qweight"}


@dataclass(frozen=True)
class DecoderLayout:
    """A step takes ``input_ids`` int64 ``[B, S]``, ``slots`` and ``starts`` int64 ``[B]``, ``rows`` int64 ``[B, K]``,
    the keys and then the values of every layer, each ``[N, Hkv, C, D]`` (see :mod:`graphwright.ir.ops.cache`); it gives
    logits ``[B, K, V]`` and the caches in the same order. Where its adapters are switched as it runs, behind the caches
    comes ``adapter_weights`` float32 ``[B, adapters]``.

    Attributes:
        keys: heads and head dim of every layer's keys.
        values: the same of its values.
        vocabulary: V.
        length: positions that a text can have, where a table of learned or stored positions ends; ``None`` without one.
        adapters: how many adapters every row gives a weight of; 0 where none is switched.
    """

    keys: tuple[tuple[int, int], ...]
    values: tuple[tuple[int, int], ...]
    vocabulary: int
    length: int | None = None
    adapters: int = 0

    @property
    def layers(self) -> int:
        """How many layers have a cache."""
        return len(self.keys)

    @staticmethod
    def find(program: Program) -> DecoderLayout | None:
        """The layout of a decoding step, or ``None`` for any other program."""
        inputs = program.inputs
        names = tuple(str(node.target) for node in inputs)
        adapters = _adapters(program, inputs[-1]) if names[-1:] == (ADAPTER_WEIGHTS,) else 0
        caches = inputs[len(_FIRST) : -1 if adapters else None]
        if names[: len(_FIRST)] != _FIRST or len(caches) % 2 or len(caches) == 0:
            return None
        layers = len(caches) // 2
        wanted = tuple(f"{kind}_{layer}" for kind in ("keys", "values") for layer in range(layers))
        if names[len(_FIRST) : len(_FIRST) + len(caches)] != wanted:
            return None
        shapes: list[tuple[int, int]] = []
        for node in caches:
            kind = program.type_of(node)
            if not isinstance(kind, TensorType) or len(kind.shape) != 4:
                return None
            heads, width = kind.shape[1], kind.shape[3]
            if not isinstance(heads, int) or not isinstance(width, int):
                return None
            shapes.append((heads, width))
        results = program.output.args[0]
        logits = program.type_of(results[0]) if isinstance(results, tuple | list) and results else None  # type: ignore[arg-type]
        if not isinstance(logits, TensorType) or not isinstance(logits.shape[-1], int):
            return None
        keys, values = tuple(shapes[:layers]), tuple(shapes[layers:])
        return DecoderLayout(keys, values, logits.shape[-1], _length(program), adapters)

    @staticmethod
    def of(program: Program) -> DecoderLayout:
        """The layout of a decoding step.

        Raises:
            ProgramError: the program is not one.
        """
        found = DecoderLayout.find(program)
        if found is None:
            raise ProgramError(
                "is not a decoding step",
                where=f"program {program.title!r}",
                hint="trace a causal language model with load_decoder",
            )
        return found

    def caches(self, program: Program) -> list[fx.Node]:
        """The inputs that are the caches: the keys and then the values of every layer."""
        return program.inputs[len(_FIRST) : len(_FIRST) + 2 * self.layers]

    def cache_bytes(self, slots: int, capacity: int, element_bytes: int) -> int:
        """Bytes of all caches."""
        per_position = sum(heads * width for heads, width in (*self.keys, *self.values))
        return per_position * slots * capacity * element_bytes


def position_of(node: Any, starts: fx.Node) -> int | None:
    """The constant ``c`` of a node that is ``starts[:, None] + arange(tokens) + c``; ``None`` for any other."""
    offset = 0
    while isinstance(node, fx.Node) and op_name(node) in ("aten.add.Tensor", "aten.add.Scalar"):
        first, second = node.args[:2]
        if len(node.args) + len(node.kwargs) > 2:
            return None
        if isinstance(second, int):
            node, offset = first, offset + second
            continue
        if not isinstance(first, fx.Node) or not isinstance(second, fx.Node):
            return None
        column, steps = (first, second) if op_name(first) == "aten.unsqueeze" else (second, first)
        found = column.args == (starts, 1) and op_name(column) == "aten.unsqueeze" and op_name(steps) == "aten.arange"
        return offset if found and len(steps.args) == 1 else None
    return None


def _adapters(program: Program, node: fx.Node) -> int:
    """The columns of the weights of adapters."""
    kind = program.type_of(node)
    columns = kind.shape[-1] if isinstance(kind, TensorType) and len(kind.shape) == 2 else 0
    return columns if isinstance(columns, int) else 0


def _length(program: Program) -> int | None:
    """The shortest table that is looked up by positions."""
    found: list[int] = []
    starts = program.inputs[2]
    for node in program.nodes:
        table = _TABLES.get(op_name(node))
        offset = position_of(argument(node, "indices"), starts) if table is not None else None
        if table is not None and offset is not None:
            weight = argument(node, table)
            # A program that was only read to be run has no types of its weights.
            rows = program.tensor(weight) if weight.op == "get_attr" else fake_of(weight)
            found.append(int(rows.shape[0]) - offset)
    return min(found, default=None)


def draw_step(
    program: Program, sizes: Mapping[str, int], generator: torch.Generator, *, vocabulary: int | None = None
) -> list[torch.Tensor]:
    """Random inputs of a decoding step: distinct slots, positions within the capacity, rows within the tokens.

    Args:
        program: a decoding step.
        sizes: of its dimensions by name.
        generator: of the random numbers; caches are normal.
        vocabulary: how many token ids there are; as many as logits by default.

    Returns:
        one tensor for each input, in their order; weights of adapters are drawn between 0 and 1.

    Raises:
        ProgramError: the program is not a decoding step.
        InputError: fewer slots than rows of the batch, or less capacity than tokens.
    """
    layout = DecoderLayout.of(program)
    shapes = [
        [size if isinstance(size, int) else sizes[size] for size in program.type_of(node).shape]  # type: ignore[union-attr]
        for node in program.inputs
    ]
    (batch, tokens), selected, (slots, _, capacity, _) = shapes[0], shapes[3][1], shapes[4]
    if slots < batch or capacity < tokens:
        raise InputError(
            f"{slots} slots of {capacity} positions do not hold {batch} rows of {tokens} tokens", where="decoding step"
        )
    last = min(capacity, layout.length or capacity)
    drawn = [
        torch.randint(0, vocabulary or layout.vocabulary, (batch, tokens), generator=generator),
        torch.randperm(slots, generator=generator)[:batch],
        torch.randint(0, max(last - tokens, 0) + 1, (batch,), generator=generator),
        torch.randint(0, tokens, (batch, selected), generator=generator),
    ]
    for node, shape in zip(layout.caches(program), shapes[4:], strict=False):
        drawn.append(torch.randn(shape, generator=generator).to(node.meta[VAL].dtype))
    if layout.adapters:
        drawn.append(torch.rand(shapes[-1], generator=generator))
    return drawn
