"""Taps: what the layers of a program give, beside what the program gives."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx
from torch.utils import _pytree as pytree

from graphwright.ir.blocks import Block, blocks_of
from graphwright.ir.errors import InputError, SelectionError
from graphwright.ir.pattern import Refusal
from graphwright.ir.program import Program
from graphwright.ir.taps import Tapped
from graphwright.ir.types import TensorType
from graphwright.passes.base import Pass
from graphwright.passes.contract import Contract, Exact


@dataclass(frozen=True, kw_only=True)
class TapFeatures(Pass):
    """Let a program also give what its layers give: the hidden states behind each repeated layer.

    ::

        %add_3 = aten.add.Tensor(%add_2, %down)            the last value of model.layers.0
        return (%logits,)
        ->
        %add_3 = aten.add.Tensor(%add_2, %down)
        return (%logits, %add_3, ...)                      named features.model.layers.0, ...

    A call then returns a :class:`Tapped`, whose attributes are those of the output as it was, with ``features``, the
    hidden states by the layers' module paths. Layers are found as :func:`graphwright.ir.blocks.blocks_of` does; what a
    layer gives is the one floating-point value that is computed in it and read behind it. Nothing else changes, so
    every other output stays as it is, bit for bit.

    It does not fire for a layer that gives several values or none (said in the refusals), and not on a program that has
    the wanted taps already. A program with other taps, and one without layers, are errors.

    Attributes:
        where: layers; all by default.
    """

    name: ClassVar[str] = "tap-features"
    contract: ClassVar[Contract] = Exact(bitwise=True)
    respects: ClassVar[frozenset[str]] = frozenset()

    def run(self, program: Program) -> bool:
        """Add the outputs.

        Raises:
            SelectionError: no layer was found or selected.
            InputError: the program has other taps.
        """
        chosen = self.selected(program)
        found: dict[str, fx.Node] = {}
        refused: list[Refusal] = []
        for block, value in given_by_layers(program):
            if isinstance(value, str):
                refused.append(Refusal(self.name, block.nodes[-1].name, block.path, value, 1))
            elif chosen(value):
                found[block.path] = value
        program.notes["refusals"] = (*program.notes.get("refusals", ()), *refused)
        if not found:
            reason = f": {refused[0].reason}" if refused else ""
            raise SelectionError(
                f"there is no layer to tap{reason}",
                where=f"program {program.title!r}",
                hint="layers are modules with a number in their path, such as model.layers.3",
            )
        present = taps_of(program)
        if present == found:
            return False
        if present:
            raise InputError(
                f"the program has taps already: {', '.join(present)}", where=self.name, hint="run RemoveTaps first"
            )
        with program.edit() as rewriter:
            output = program.output
            output.args = ((*program.results, *found.values()),)
            leaves: Any = range(program.signature.out_spec.num_leaves)
            taps: dict[str, Any] = dict.fromkeys(found, 0)
            spec = pytree.tree_structure(Tapped(program.signature.unflatten(leaves), taps))
            program.signature = dataclasses.replace(program.signature, out_spec=spec)
            rewriter.changed = True
        program.notes["taps"] = list(found)
        return True


@dataclass(frozen=True, kw_only=True)
class RemoveTaps(Pass):
    """Let a program give what it gave before :class:`TapFeatures`.

    ::

        return (%logits, %add_3, ...)
        ->
        return (%logits,)

    It does not fire on a program without taps. Nothing else changes: the tapped values go on being computed.
    """

    name: ClassVar[str] = "remove-taps"
    contract: ClassVar[Contract] = Exact(bitwise=True)
    respects: ClassVar[frozenset[str]] = frozenset()

    def run(self, program: Program) -> bool:
        """Take the outputs away."""
        count = len(taps_of(program))
        if not count:
            return False
        with program.edit() as rewriter:
            program.signature = dataclasses.replace(
                program.signature, out_spec=program.signature.out_spec.children()[0]
            )
            program.output.args = (tuple(program.results[:-count]),)
            rewriter.changed = True
        return True


def taps_of(program: Program) -> dict[str, fx.Node]:
    """The tapped values by the module paths of their layers; empty without taps."""
    spec = program.signature.out_spec
    if spec.type is not Tapped:
        return {}
    paths = list(spec.context)
    return dict(zip(paths, program.results[-len(paths) :], strict=True))


def given_by_layers(program: Program) -> list[tuple[Block, fx.Node | str]]:
    """Every layer with the hidden states that it gives, or why it cannot be told which they are."""
    given = {block: _given(program, block) for block in blocks_of(program) if block.path}
    # A layer may give more than one value, such as a bias of attention that all later ones read: then it is the one
    # that is like what the other layers give.
    usual = {program.type_of(values[0]) for values in given.values() if len(values) == 1}
    found: list[tuple[Block, fx.Node | str]] = []
    for block, values in given.items():
        alike = [value for value in values if len(values) == 1 or program.type_of(value) in usual]
        names = ", ".join(f"%{node.name}" for node in values) or "nothing"
        reason = f"the layer {block.path} gives {names} to what follows, not one value"
        found.append((block, alike[0] if len(alike) == 1 else reason))
    return found


def _given(program: Program, block: Block) -> list[fx.Node]:
    inside, end = set(block.nodes), program.output
    constant: set[fx.Node] = set()  # weights in another form: no hidden states
    for node in block.nodes:
        if all(source.op == "get_attr" or source in constant for source in node.all_input_nodes):
            constant.add(node)
    read = [
        node
        for node in block.nodes
        if node not in constant and _is_floating(program, node) and any(user not in inside for user in node.users)
    ]
    # Values that only leave the program, such as caches, are not what the next layer reads.
    return [node for node in read if any(user not in inside and user is not end for user in node.users)] or read


def _is_floating(program: Program, node: fx.Node) -> bool:
    kind = program.type_of(node)
    return isinstance(kind, TensorType) and kind.dtype.is_floating_point
