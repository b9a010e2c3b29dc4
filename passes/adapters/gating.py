"""Several adapters on one base, switched and mixed as the program runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from graphwright.ir import provenance
from graphwright.ir.arguments import argument
from graphwright.ir.decoder import ADAPTER_WEIGHTS
from graphwright.ir.errors import InputError, SelectionError
from graphwright.ir.names import op_name
from graphwright.ir.program import Program
from graphwright.ir.provenance import tags_of
from graphwright.ir.rewriter import Rewriter
from graphwright.ir.types import VAL, TensorType
from graphwright.passes.adapters.builder import exit_tag, fed_tag, tag_of
from graphwright.passes.adapters.inserted import FOLDED, GATED, INPUTS, adapter_of, adapters_of, base_of, checked_names
from graphwright.passes.adapters.sites import ADAPTER
from graphwright.passes.base import Pass
from graphwright.passes.contract import Contract, Exact


@dataclass(frozen=True, kw_only=True)
class GateAdapters(Pass):
    """Let every call say for each row of its batch which adapters take part, and how much.

    ::

        %hidden = aten.linear(%x, %lora_A)
        %branch = aten.linear(%hidden, %lora_B)
        %adapted = aten.add.Tensor(%y, %branch)
        ->
        %weight = aten.slice.Tensor(%adapter_weights, 1, 0, 1)      of the first adapter, one number a row
        %gated = aten.mul.Tensor(%hidden, aten.unsqueeze(%weight, -1))
        %branch = aten.linear(%gated, %lora_B)
        %adapted = aten.add.Tensor(%y, %branch)

    The program gets an input ``adapter_weights``, float32 ``[batch, adapters]``, which :func:`adapter_weights` makes
    from names. A value ``y`` that an adapter makes ``f(y)`` becomes ``y + w (f(y) - y)``: 0 leaves it as it was, 1
    adapts it, and what lies between mixes. Where ``f`` adds a branch, the branch is multiplied; where that ends in a
    linear, its input, which has fewer numbers. Adapters at one place follow each other in the order in which they were
    put in; those that add something that does not depend on each other, such as LoRA, simply add up.

    A decoding step's sessions keep the weights for each slot, and ``generate(prompts, adapters=["a", None])`` gives
    them by prompt; caches hold what the chosen adapters made of a text.

    With all weights 1 the program is what it was. It does not fire on a program whose adapters are switched already:
    that, no adapter, and a value that has no row of the batch in front are errors.

    Attributes:
        adapters: names, in the order of the columns; ``None`` for all, in the order in which they were put in. Others
            stay on for every row.
    """

    name: ClassVar[str] = "gate-adapters"
    contract: ClassVar[Contract] = Exact()
    respects: ClassVar[frozenset[str]] = frozenset()

    adapters: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        names = checked_names(self.name, self.adapters)
        if names is not None and len(set(names)) < max(len(names), 1):
            raise InputError(f"has a name twice, or none: {names!r}", where=f"{self.name}: adapters")
        object.__setattr__(self, "adapters", names)

    def run(self, program: Program) -> bool:
        """Add the input and the gates; all or nothing.

        Raises:
            SelectionError: the program has no adapter.
            InputError: there is none of a name, they are switched already, or a value has no batch in front.
        """
        if GATED in program.records:
            raise InputError(
                f"the adapters {', '.join(map(repr, program.records[GATED]))} are switched by calls already",
                where=f"program {program.title!r}",
                hint="insert all adapters first, and gate them once",
            )
        names = self.adapters or tuple(adapters_of(program))
        if not names:
            raise SelectionError("there is no adapter to switch", where=f"{self.name}: adapters", hint="insert some")
        chosen = [adapter_of(program, name) for name in names]
        with program.edit() as rewriter:
            batch = program.inputs[0].meta[VAL].shape[0]
            weights = rewriter.add_input(ADAPTER_WEIGHTS, (batch, len(names)), torch.float32, stand_in=1.0)
            for column, adapter in enumerate(chosen):
                gates = _Gates(rewriter, weights, column, adapter.name)
                for site in adapter.sites.values():
                    for exit_ in site.exits:
                        gates.put(exit_, site.path)
            program.records[GATED] = list(names)
        program.notes["gated"] = list(names)
        return True


class _Gates:
    """The gates of one adapter."""

    def __init__(self, rewriter: Rewriter, weights: fx.Node, column: int, name: str) -> None:
        self.rewriter, self.weights, self.column, self.name = rewriter, weights, column, name
        self._made: dict[tuple[int, torch.dtype], fx.Node] = {}

    def put(self, exit_: fx.Node, path: str) -> None:
        """Put a gate before what gives an adapted value."""
        base = base_of(exit_, self.name)
        if op_name(exit_) == "aten.add.Tensor" and exit_.args[0] is base and not exit_.kwargs and self._own(exit_, 1):
            branch = exit_.args[1]
            assert isinstance(branch, fx.Node)
            bare = op_name(branch) == "aten.linear" and argument(branch, "bias") is None and self._own(branch, 0)
            if bare and len(branch.users) == 1:
                hidden, matrix = branch.args[:2]
                self.rewriter.set_arguments(branch, self._times(hidden, path, branch), matrix, None)
            else:
                self.rewriter.set_arguments(exit_, base, self._times(branch, path, exit_))
            return
        difference = self._call("aten.sub.Tensor", exit_, base, like=exit_)
        new = self._call("aten.add.Tensor", base, self._times(difference, path, exit_), like=exit_)
        ends = tags_of(exit_) & {exit_tag(self.name), fed_tag(self.name)}
        self.rewriter.redirect(exit_, new, besides=(difference,))
        exit_.meta[provenance.TAGS] = tags_of(exit_) - ends
        new.meta[provenance.TAGS] = tags_of(new) | ends

    def _times(self, value: Any, path: str, like: fx.Node) -> fx.Node:
        """``w · value``, row by row."""
        kind, rows = self.rewriter.program.type_of(value), self.rewriter.program.type_of(self.weights)
        assert isinstance(rows, TensorType)
        if not isinstance(kind, TensorType) or not kind.dtype.is_floating_point or kind.shape[0] != rows.shape[0]:
            raise InputError(
                f"adapter {self.name!r} gives {kind}, which has no row of the batch ({rows.shape[0]}) in front",
                where=path,
                hint="leave it out with adapters=, or bring the layer into that form (UnflattenRows) before inserting",
            )
        key = len(kind.shape), kind.dtype
        if key not in self._made:
            gate = self._call("aten.slice.Tensor", self.weights, 1, self.column, self.column + 1, like=like)
            for _ in range(len(kind.shape) - 2):
                gate = self._call("aten.unsqueeze", gate, -1, like=like)
            if kind.dtype != torch.float32:
                gate = self._call("aten.to.dtype", gate, kind.dtype, like=like)
            self._made[key] = gate
        return self._call("aten.mul.Tensor", value, self._made[key], like=like)

    def _call(self, target: str, *args: Any, like: fx.Node) -> fx.Node:
        node = self.rewriter.call(target, *args, like=like)
        node.meta[provenance.TAGS] = frozenset({ADAPTER, tag_of(self.name)})
        return node

    def _own(self, node: fx.Node, index: int) -> bool:
        operand = node.args[index]
        return isinstance(operand, fx.Node) and tag_of(self.name) in tags_of(operand) and operand.op != "get_attr"


def adapter_weights(program: Program, rows: Sequence[str | Mapping[str, float] | None]) -> torch.Tensor:
    """What a call of a program with :class:`GateAdapters` gives as ``adapter_weights``.

    Args:
        program: it has the adapters.
        rows: for each row of the batch the name of an adapter, several with their weights, or ``None`` for the base
            alone.

    Returns:
        float32 ``[rows, adapters]``.

    Raises:
        InputError: the program's adapters are not switched by calls, it has none of a name, or a weight is no finite
            number.
    """
    columns = switched_adapters(program)
    if not program.records.get(GATED):
        raise InputError(
            "its adapters are not switched by calls", where=f"program {program.title!r}", hint="run GateAdapters on it"
        )
    found = torch.zeros(len(rows), len(program.records[GATED]))
    for index, row in enumerate(rows):
        given = {} if row is None else {row: 1.0} if isinstance(row, str) else row
        if not isinstance(given, Mapping):
            raise InputError(
                f"is a {type(row).__name__}", where=f"row {index}", hint="give a name, names with weights, or None"
            )
        for name, weight in given.items():
            if name not in columns:
                raise InputError(
                    f"there is no adapter {name!r} that calls switch",
                    where=f"row {index}",
                    hint=f"there are {', '.join(map(repr, columns))}",
                )
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
                raise InputError(f"the weight of {name!r} is {weight!r}, no finite number", where=f"row {index}")
            found[index, columns[name]] = weight
    return found


def switched_adapters(program: Program) -> dict[str, int]:
    """The adapters that calls switch, each with its column of the weights; without those that were taken out since."""
    present = {*adapters_of(program), *program.records.get(INPUTS, {}), *program.records.get(FOLDED, {})}
    return {name: column for column, name in enumerate(program.records.get(GATED, [])) if name in present}
