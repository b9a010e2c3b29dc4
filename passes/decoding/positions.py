"""Looking up what depends on positions alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import fx, nn

from graphwright.ir.arguments import argument
from graphwright.ir.decoder import DecoderLayout, position_of
from graphwright.ir.errors import InputError
from graphwright.ir.names import op_name
from graphwright.ir.pattern import Refusal
from graphwright.ir.program import Program
from graphwright.ir.provenance import path_of
from graphwright.ir.rewriter import Rewriter
from graphwright.ir.types import TensorType, fake_of
from graphwright.passes.base import Pass
from graphwright.passes.cleanup.effects import is_assertion, is_pure

# Operators that compute each element from the same position's element of their operands.
_ELEMENTWISE = frozenset(
    f"aten.{name}"
    for name in (
        "abs",
        "add.Scalar",
        "add.Tensor",
        "clamp",
        "cos",
        "div.Scalar",
        "div.Tensor",
        "exp",
        "floor",
        "log",
        "maximum",
        "minimum",
        "mul.Scalar",
        "mul.Tensor",
        "neg",
        "pow.Scalar",
        "pow.Tensor_Scalar",
        "reciprocal",
        "rsqrt",
        "sin",
        "sqrt",
        "sub.Scalar",
        "sub.Tensor",
        "to.dtype",
    )
)

# Operators along an axis, which must not be that of batch or tokens.
_ALONG = frozenset({"aten.cat", "aten.unsqueeze", "aten.slice.Tensor", "aten.repeat_interleave.self_int"})


@dataclass(frozen=True, kw_only=True)
class TabulatePositions(Pass):
    """Store what a decoding step computes from positions alone as a table, and look it up.

    Before (rotary embedding)::

        %column = aten.unsqueeze(%starts, 1)
        %steps = aten.arange(%tokens)
        %positions = aten.add.Tensor(%column, %steps)
        %third = aten.unsqueeze(%positions, 2)
        %floats = aten.to.dtype(%third, torch.float32)
        %half = aten.mul.Tensor(%floats, %inv_freq)
        %angles = aten.cat([%half, %half], -1)
        %cos = aten.cos(%angles)

    After::

        %column = aten.unsqueeze(%starts, 1)
        %steps = aten.arange(%tokens)
        %positions = aten.add.Tensor(%column, %steps)
        %cos = aten.embedding(%rotary_emb_cos_table, %positions)

    A table is computed with the program's own operators in its own dtypes, so a looked-up value is the computed one.
    Learned positions with an offset (OPT) become a table without it. Tables of the same content are one. A position of
    ``length`` or more raises ``IndexError``.

    Does not fire when

    - the program is not a decoding step;
    - the value depends on the text, on how many tokens there are, or on a trainable parameter other than a table of
      learned positions that nothing else reads;
    - it has more than one axis beside batch and tokens, or is an integer or a cast of one;
    - it is a lookup by positions already.

    Attributes:
        length: positions that there are; fewer where a table of learned positions is shorter.
    """

    name: ClassVar[str] = "tabulate-positions"

    length: int = 4096

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.length, bool) or not isinstance(self.length, int) or self.length < 1:
            raise InputError(f"must be a number of positions, not {self.length!r}", where=f"{self.name}: length")

    def run(self, program: Program) -> bool:
        """Find the positions, what depends on nothing else, and where that is read."""
        if DecoderLayout.find(program) is None:
            return False
        selected = self.selected(program)
        refusals: list[Refusal] = []
        tables: list[_Table] = []
        done = 0
        with program.edit() as rewriter:
            for positions in [node for node in program.nodes if _is_positions(program, node)]:
                region = self._region(program, positions, refusals)
                for node in [item for item in region if _is_read(item, region)]:
                    reason = "not selected by where= / ignore=" if not selected(node) else _objection(program, node)
                    if reason is not None:
                        refusals.append(Refusal(self.name, node.name, path_of(node), reason, 2))
                    elif _is_worth_it(node, positions):
                        done += self._tabulate(rewriter, node, positions, tables, refusals)
        program.notes["rewrites"] = program.notes.get("rewrites", 0) + done
        program.notes["refusals"] = (*program.notes.get("refusals", ()), *refusals)
        return done > 0

    def _region(self, program: Program, positions: fx.Node, refusals: list[Refusal]) -> set[fx.Node]:
        """The positions and what depends on them and constants only, position by position."""
        region = {positions}
        for node in program.nodes:
            if node in region or not any(source in region for source in node.all_input_nodes):
                continue
            reason = _mixes(program, node, region)
            if reason is None:
                region.add(node)
            elif op_name(node) != "graphwright.rotary_embedding" and not is_assertion(node):
                refusals.append(Refusal(self.name, node.name, path_of(node), reason, 1))
        return region

    def _tabulate(
        self,
        rewriter: Rewriter,
        node: fx.Node,
        positions: fx.Node,
        tables: list[_Table],
        refusals: list[Refusal],
    ) -> int:
        program = rewriter.program
        length = min(self.length, _rows(program, node, positions, self.length))
        if length < 1:
            refusals.append(Refusal(self.name, node.name, path_of(node), "its table has no row for position 0", 2))
            return 0
        value = _evaluate(program, node, {positions: torch.arange(length).unsqueeze(0)})[0]
        content = value.reshape(length, -1).clone()
        known = next((table for table in tables if table.holds(content, positions)), None)
        if known is None:
            source = _trainable(program, node)
            if source is not None:
                content = nn.Parameter(content, source.requires_grad)
            name = f"{path_of(node)}.{node.name}_table".lstrip(".")
            weight = rewriter.weight(name, content, like=node)
            known = _Table(content, positions, rewriter.call("aten.embedding", weight, positions, like=node))
            tables.append(known)
        new = known.lookup
        if value.dim() == 1:
            new = rewriter.call("aten.squeeze.dim", new, 2, like=node)
        rewriter.replace(node, new)
        return 1


@dataclass(frozen=True)
class _Table:
    content: torch.Tensor
    positions: fx.Node
    lookup: fx.Node

    def holds(self, content: torch.Tensor, positions: fx.Node) -> bool:
        """Whether it is the same table looked up by the same positions."""
        alike = self.content.dtype == content.dtype and torch.equal(self.content, content)
        return alike and positions is self.positions and not isinstance(self.content, nn.Parameter)


def _is_positions(program: Program, node: fx.Node) -> bool:
    """``starts[:, None] + arange(tokens)``, one for each of the step's tokens."""
    is_sum = op_name(node) == "aten.add.Tensor" and not isinstance(node.args[1], int)
    return (
        is_sum
        and position_of(node, program.inputs[2]) == 0
        and program.type_of(node) == program.type_of(program.inputs[0])
    )


def _is_read(node: fx.Node, region: set[fx.Node]) -> bool:
    """Whether something beside the region reads it."""
    return any(user not in region and not is_assertion(user) for user in node.users)


def _is_worth_it(node: fx.Node, positions: fx.Node) -> bool:
    source = node
    while op_name(source) in ("aten.to.dtype", "aten.unsqueeze"):
        source = argument(source, "self")
    if not fake_of(source).is_floating_point():
        return False
    return op_name(node) != "aten.embedding" or argument(node, "indices") is not positions


def _mixes(program: Program, node: fx.Node, region: set[fx.Node]) -> str | None:
    """Why the node depends on more than the positions, or not position by position."""
    name = op_name(node)
    if node.op != "call_function" or not is_pure(node):
        return f"{name or node.op} does not compute a value"
    others = [source for source in node.all_input_nodes if source not in region]
    depends = next((source for source in others if not _is_constant(source)), None)
    if depends is not None:
        return f"it depends on %{depends.name} too, not on positions alone"
    kind = program.type_of(node)
    if not isinstance(kind, TensorType):
        return "it is not one tensor"
    if name == "aten.embedding":
        return None if argument(node, "indices") in region else "positions are its table"
    if name in _ALONG:
        dim = argument(node, "dim")
        rank = len(kind.shape)
        along = isinstance(dim, int) and dim % rank >= 2
        return None if along else f"{name} is along the batch or the tokens"
    if name not in _ELEMENTWISE:
        return f"{name} is none of the known operators on each position by itself"
    for source in others:
        shape = (*[1] * len(kind.shape), *fake_of(source).shape)[-len(kind.shape) :]
        if shape[0] != 1 or shape[1] != 1:
            return f"%{source.name} differs between batch entries or tokens"
    return None


def _is_constant(node: fx.Node) -> bool:
    if node.op == "get_attr":
        return True
    return node.op == "call_function" and is_pure(node) and all(map(_is_constant, node.all_input_nodes))


def _objection(program: Program, node: fx.Node) -> str | None:
    kind = program.type_of(node)
    assert isinstance(kind, TensorType)
    if len(kind.shape) > 3:
        return f"it is {kind}, with more than one axis beside batch and tokens"
    for item in _cone(node):
        if item.op != "get_attr" or not program.tensor(item).requires_grad:
            continue
        if op_name(node) != "aten.embedding" or argument(node, "weight") is not item:
            return f"it depends on the trainable parameter {item.target!r}"
        if len(item.users) > 1:
            return f"the trainable parameter {item.target!r} is used elsewhere too"
    return None


def _trainable(program: Program, node: fx.Node) -> nn.Parameter | None:
    """The table of learned positions, if it is a parameter."""
    weight = program.tensor(argument(node, "weight")) if op_name(node) == "aten.embedding" else None
    return weight if isinstance(weight, nn.Parameter) else None


def _cone(node: fx.Node) -> set[fx.Node]:
    """The node and all that it is computed from."""
    found: set[fx.Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current not in found:
            found.add(current)
            stack.extend(current.all_input_nodes)
    return found


def _rows(program: Program, node: fx.Node, positions: fx.Node, length: int) -> int:
    """For how many positions from 0 on every lookup on the way has a row."""
    for item in sorted(_cone(node)):
        if op_name(item) != "aten.embedding" or positions not in _cone(item):
            continue
        indices = _evaluate(program, argument(item, "indices"), {positions: torch.arange(length).unsqueeze(0)})
        rows = program.tensor(argument(item, "weight")).shape[0]
        inside = ((indices >= 0) & (indices < rows)).reshape(length, -1).all(dim=1)
        length = int(inside.cumprod(0).sum())
    return length


def _evaluate(program: Program, node: fx.Node, given: Mapping[fx.Node, torch.Tensor]) -> torch.Tensor:
    """The value of a node in the program's own dtypes."""
    values: dict[fx.Node, Any] = dict(given)

    def value_of(source: fx.Node) -> Any:
        if source.op == "get_attr":
            return program.tensor(source)
        if source not in values:
            args, kwargs = fx.node.map_arg((source.args, source.kwargs), value_of)
            values[source] = cast(Callable[..., Any], source.target)(*args, **kwargs)
        return values[source]

    with torch.no_grad():
        result: torch.Tensor = value_of(node)
    return result.detach()
