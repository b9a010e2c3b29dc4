"""Dividing the features of a value by factors, and multiplying the weights that read it: nothing changes but rounding.

::

    %n = graphwright.rms_norm(%h, %w, 1e-05)          %n' = graphwright.rms_norm(%h, %w / s, 1e-05)
    %q = aten.linear(%n, %wq)                   ->    %q  = aten.linear(%n', %wq * s)
    %k = aten.linear(%n, %wk)                         %k  = aten.linear(%n', %wk * s)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphwright.ir.errors import InputError
from graphwright.ir.program import Program
from graphwright.ir.rewriter import Rewriter
from graphwright.passes.quantization.equivalence.absorbing import Absorption, absorption
from graphwright.passes.quantization.equivalence.groups import Group

FOLDS = ("auto", "only", "multiply")


@dataclass(frozen=True)
class Place:
    """Where the factors of a group go.

    Attributes:
        group: whose weights are multiplied with them.
        absorbed: what is divided by them; ``None``: the group's input, by a multiplication of its own.
        why: what kept them from being absorbed.
    """

    group: Group
    absorbed: Absorption | None
    why: str = ""

    def tied(self, factors: torch.Tensor) -> torch.Tensor:
        """Factors ``[features]`` as this place can take them: the same where features cannot be told apart."""
        return factors if self.absorbed is None else self.absorbed.tied(factors)


def check_fold(name: str, fold: str) -> None:
    """Check the option ``fold``.

    Raises:
        InputError: it is none of :data:`FOLDS`.
    """
    if fold not in FOLDS:
        raise InputError(f"must be one of {', '.join(map(repr, FOLDS))}, not {fold!r}", where=f"{name}: fold")


def place_of(program: Program, group: Group, fold: str, respects: frozenset[str]) -> Place | str:
    """Where a group's factors go, or why there is no place for them.

    Args:
        program: the program.
        group: the linears.
        fold: ``"auto"``: into weights, else a multiplication; ``"only"`` the one, ``"multiply"`` the other.
        respects: tags of nodes whose weights are left alone.
    """
    if fold == "multiply":
        return Place(group, None)
    found = absorption(program, group.x, {linear.node for linear in group.linears}, respects)
    if isinstance(found, Absorption):
        return Place(group, found)
    return found if fold == "only" else Place(group, None, found)


def scale(rewriter: Rewriter, place: Place, factors: torch.Tensor) -> None:
    """Multiply the weights of a group with factors and divide what they read.

    Weights are computed in float64 and stored in their own dtype.

    Args:
        rewriter: of the program.
        place: where the factors go.
        factors: ``[features]``, positive and finite; see :meth:`Place.tied`.
    """
    group, wide = place.group, factors.detach().double()
    if place.absorbed is None:  # what the multiplication holds is rounded; the weights make up for what is left
        wide = 1 / (1 / wide).to(rewriter.program.tensor(group.linears[0].weight).dtype).double()
    for linear in group.linears:
        times(rewriter, linear.weight, wide.unsqueeze(1) if linear.transposed else wide)
    if place.absorbed is None:
        _multiply(rewriter, group, 1 / wide)
        return
    absorb(rewriter, place.absorbed, 1 / wide)


def absorb(rewriter: Rewriter, found: Absorption, factors: torch.Tensor) -> None:
    """Multiply a value with factors ``[features]`` float64, where it is made."""
    padded = torch.cat((factors, torch.ones(1, dtype=torch.float64)))  # -1: no feature
    for edit in found.edits:
        times(rewriter, edit.weight, padded[edit.layout])
    renew(rewriter, found.changed)


def times(rewriter: Rewriter, weight: fx.Node, factors: torch.Tensor) -> None:
    """Multiply a weight with factors, broadcast to it, float64."""
    old = rewriter.program.tensor(weight).detach()
    rewriter.rebind(weight, (old.double() * factors).to(old.dtype))


def renew(rewriter: Rewriter, nodes: list[fx.Node]) -> None:
    """Put new nodes in the place of nodes, in order, whose values have another meaning now.

    A node that keeps its name is held to its old value when the pass is verified.
    """
    for node in nodes:
        keywords: dict[str, Any] = dict(node.kwargs)
        new = rewriter.call(node.target, *node.args, like=node, name=f"{node.name}_scaled", **keywords)
        rewriter.replace(node, new, equivalent=False)


def _multiply(rewriter: Rewriter, group: Group, factors: torch.Tensor) -> None:
    first = group.linears[0]
    dtype = rewriter.program.tensor(first.weight).dtype
    stem = str(first.weight.target).removesuffix("weight")
    name = f"{stem}input_factors" if stem.endswith(".") or not stem else f"{stem}_input_factors"
    held = rewriter.weight(name, factors.to(dtype), like=first.node)
    scaled = rewriter.call("aten.mul.Tensor", group.x, held, like=first.node)
    for linear in group.linears:
        arguments = fx.node.map_arg((linear.node.args, linear.node.kwargs), lambda n: scaled if n is group.x else n)
        rewriter.set_arguments(linear.node, *arguments[0], **arguments[1])
