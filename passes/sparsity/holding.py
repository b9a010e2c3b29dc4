"""Masks that are held while a program trains, and let go of again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from graphwright.ir.arguments import arguments_of
from graphwright.ir.errors import InputError
from graphwright.ir.names import op_name
from graphwright.ir.pattern import Refusal
from graphwright.ir.program import Program
from graphwright.ir.provenance import path_of
from graphwright.ir.pruned import MASKED, follow, is_masked
from graphwright.passes.base import Pass
from graphwright.passes.contract import Contract, Exact
from graphwright.passes.quantization.targets import LinearTarget, linear_target
from graphwright.passes.sparsity.targets import HELD


@dataclass(frozen=True, kw_only=True)
class HoldMasks(Pass):
    """Let pruned weights train without their zeros becoming anything else.

    ::

        %y = aten.linear(%x, %w, %b)                        tagged "masked"
        ->
        %held = graphwright.apply_mask(%w, %w_mask)
        %y = aten.linear(%x, %held, %b)

    The mask, bool of the weight's shape, is set where the weight is not 0. The parameter stays the object it is, so an
    optimiser made before goes on with it; its gradient is 0 at masked weights, so that momentum and weight decay leave
    them at 0, and the linear computes with 0 there whatever an optimiser does. :class:`ReleaseMasks` takes the masks
    out again, which quantisation, merging and pruning further ask for.

    It does not fire on: linears outside ``where``; linears that were not pruned; masks that are held already.
    """

    name: ClassVar[str] = "hold-masks"
    contract: ClassVar[Contract] = Exact(bitwise=True)

    def run(self, program: Program) -> bool:
        """Hold the mask of every pruned weight that is selected."""
        chosen = self.selected(program)
        refusals: list[Refusal] = []
        weights: dict[str, fx.Node] = {}
        for node in program.nodes:
            found = linear_target(program, node) if node.op == "call_function" and is_masked(node) else None
            if isinstance(found, LinearTarget) and "adapter" not in node.meta.get("tags", ()):
                if chosen(node):
                    weights.setdefault(str(found.weight.target), node)
                else:
                    reason = "not selected by where= / ignore="
                    refusals.append(Refusal(self.name, node.name, path_of(node), reason, 1))
        held = 0
        with program.edit() as rewriter:
            for name, like in weights.items():
                mask = program.tensor(name).detach() != 0
                for weight in [each for each in program.nodes if each.op == "get_attr" and each.target == name]:
                    stored = rewriter.weight(f"{name}_mask", mask, like=like, tags=(MASKED,))
                    node = rewriter.call("graphwright.apply_mask", weight, stored, like=like, tags=(MASKED,))
                    rewriter.redirect(weight, node, besides=(node,), equivalent=False)
                held += 1
            program.notes["masks"] = held
            program.notes["refusals"] = (*program.notes.get("refusals", ()), *refusals)
            return rewriter.changed


@dataclass(frozen=True, kw_only=True)
class ReleaseMasks(Pass):
    """Take held masks out again: weights become what the linears compute with.

    ::

        %held = graphwright.apply_mask(%w, %w_mask)
        %y = aten.linear(%x, %held, %b)
        ->
        %y = aten.linear(%x, %w, %b)                        tagged "masked"; %w is 0 where its mask was not set

    A weight that already is 0 there stays the object it is. It does not fire on masks of linears outside ``where``.
    """

    name: ClassVar[str] = "release-masks"
    contract: ClassVar[Contract] = Exact(bitwise=True)

    def run(self, program: Program) -> bool:
        """Take every mask out that is selected.

        Raises:
            InputError: a weight holds NaN or infinity where its mask is set: training has diverged.
        """
        chosen = self.selected(program)
        with program.edit() as rewriter:
            for node in held_masks(program):
                if not chosen(node):
                    continue
                given = arguments_of(node)
                weight: fx.Node = given["weight"]
                new = masked_weight(program, node)
                if not bool(torch.isfinite(new).all()):
                    raise InputError(
                        "holds NaN or infinity",
                        where=f"weight {str(weight.target)!r}",
                        hint="training has diverged: go back to a checkpoint",
                    )
                if not torch.equal(new, program.tensor(weight).detach()):
                    rewriter.rebind(weight, new)
                rewriter.replace(node, weight, equivalent=False)
                name = str(weight.target)
                follow(program, [name], name, new)
            return rewriter.changed


def held_masks(program: Program) -> list[fx.Node]:
    """The nodes that hold masks, in order."""
    return [node for node in program.nodes if op_name(node) == HELD]


def masked_weight(program: Program, node: fx.Node) -> torch.Tensor:
    """What a node that holds a mask computes now."""
    given = arguments_of(node)
    return torch.where(program.tensor(given["mask"]), program.tensor(given["weight"]).detach(), 0)
