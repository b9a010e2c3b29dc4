"""Which linears outliers can be split from, and why not the others."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import fx

from graphwright.ir.pattern import Refusal
from graphwright.ir.program import Program
from graphwright.ir.provenance import path_of, tags_of
from graphwright.passes.base import Pass
from graphwright.passes.quantization.targets import LinearTarget, is_head, linear_target

# Tag of what holds the outliers, which quantisation leaves alone.
OUTLIER = "outlier"


def choose(item: Pass, program: Program, done: str, *, lm_head: bool) -> tuple[list[LinearTarget], dict[fx.Node, str]]:
    """The linears that a pass may split, in order, and the reasons of the others; ``done`` tags those it has split."""
    chosen = item.selected(program)
    targets: list[LinearTarget] = []
    reasons: dict[fx.Node, str] = {}
    for node in program.nodes:
        found = linear_target(program, node) if node.op == "call_function" else None
        if found is None:
            continue
        protected = tags_of(node) & item.respects
        if not isinstance(found, LinearTarget):
            reasons[node] = found
        elif not chosen(node):
            reasons[node] = "not selected by where= / ignore="
        elif done in tags_of(node):
            reasons[node] = "its outliers are split off already"
        elif protected:
            reasons[node] = f"it is tagged {', '.join(sorted(protected))}, which this pass leaves alone"
        elif not lm_head and is_head(program, node):
            reasons[node] = "it is the output head, which stays in floating point (set lm_head=True to split it)"
        else:
            targets.append(found)
    return targets, reasons


def shared_elsewhere(program: Program, targets: Collection[LinearTarget], *, same_input: bool) -> dict[fx.Node, str]:
    """Linears whose weight is read by something that would keep it whole, or, if asked for, from another input."""
    split = {target.node: target for target in targets}
    reasons: dict[fx.Node, str] = {}
    for target in targets:
        name = str(target.weight.target)
        for node in program.nodes:
            if node.op != "get_attr" or node.target != name:
                continue
            for user in node.users:
                other = split.get(user)
                if other is None or other.transposed != target.transposed:
                    reasons[target.node] = f"its weight is also read by %{user.name}, which needs it whole"
                elif same_input and other.x is not target.x:
                    reasons[target.node] = f"its weight is also read by %{user.name}, whose inputs are others"
    return reasons


def note_refusals(item: Pass, program: Program, reasons: dict[fx.Node, str]) -> None:
    """Put the reasons into the program's notes."""
    refusals = [Refusal(item.name, node.name, path_of(node), reason, 1) for node, reason in reasons.items()]
    program.notes["refusals"] = (*program.notes.get("refusals", ()), *refusals)


def like_whole(weight: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """A part of a weight, trainable as the whole is."""
    if isinstance(weight, torch.nn.Parameter):
        return torch.nn.Parameter(part, requires_grad=weight.requires_grad)
    return part
