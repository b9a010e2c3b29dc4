"""Rotations within attention heads, between the value projection and the output projection."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx

from graphwright.ir.names import op_name
from graphwright.ir.program import Program
from graphwright.ir.provenance import tags_of
from graphwright.ir.rewriter import Rewriter
from graphwright.passes.quantization.equivalence.absorbing import Absorption, Edit, absorption
from graphwright.passes.quantization.equivalence.folding import renew
from graphwright.passes.quantization.equivalence.groups import readers_of
from graphwright.passes.quantization.targets import LinearTarget, linear_target

_ATTENTION = frozenset({"graphwright.attention", "aten.scaled_dot_product_attention", "aten.matmul", "aten.bmm"})


@dataclass(frozen=True)
class ValueHeads:
    """Features that attention gathers, head by head.

    Attributes:
        linear: the output projection.
        found: what makes its input: rows of the value projection, named by the features they become.
        width: of a head.
    """

    linear: LinearTarget
    found: Absorption
    width: int


def value_heads(program: Program, chosen: Callable[[fx.Node], bool], respects: frozenset[str]) -> list[ValueHeads]:
    """Output projections whose inputs can be rotated head by head."""
    result = []
    for node in program.nodes:
        linear = linear_target(program, node) if node.op == "call_function" and chosen(node) else None
        if not isinstance(linear, LinearTarget) or tags_of(node) & respects:
            continue
        if [user for user in readers_of(program, linear.weight) if user is not node]:
            continue
        found = absorption(program, linear.x, {node}, respects)
        if not isinstance(found, Absorption) or not found.mixes:
            continue
        gathered = [
            each for each in found.changed if op_name(each) in _ATTENTION and linear_target(program, each) is None
        ]
        width = gathered[-1].meta["val"].shape[-1] if gathered else 0
        if isinstance(width, int) and width > 1 and all(_in_heads(edit, found, width) for edit in found.edits):
            result.append(ValueHeads(linear, found, width))
    return result


def _in_heads(edit: Edit, found: Absorption, width: int) -> bool:
    """Whether the features that a weight makes come head by head, each head in order, and copies keep that order."""
    rows = edit.layout.flatten()
    used = rows[rows >= 0]
    if not len(used) or len(used) % width or found.features % width:
        return False
    heads = used.reshape(-1, width)
    if not torch.equal(heads, heads[:, :1] + torch.arange(width)) or bool((heads[:, 0] % width != 0).any()):
        return False
    return all(bool((tie % width == tie[:, :1] % width).all()) for tie in found.ties)


def rotate_heads(rewriter: Rewriter, heads: ValueHeads, turn: torch.Tensor) -> None:
    """Rotate every head by the same orthogonal matrix ``[width, width]`` float64."""
    program, width = rewriter.program, heads.width
    for edit in heads.found.edits:
        old = program.tensor(edit.weight).detach()
        flat = edit.layout.flatten()
        places = (flat >= 0).nonzero().flatten()
        along = -1 if edit.layout.shape[-1] == len(flat) else 0
        wide = old.double().movedim(along, -1).contiguous()
        wide[..., places] = (wide[..., places].unflatten(-1, (-1, width)) @ turn).flatten(-2)
        rewriter.rebind(edit.weight, wide.movedim(-1, along).contiguous().to(old.dtype))
    weight = program.tensor(heads.linear.weight).detach()
    columns = weight.double().t() if heads.linear.transposed else weight.double()
    turned = (columns.unflatten(-1, (-1, width)) @ turn).flatten(-2)
    rewriter.rebind(
        heads.linear.weight, (turned.t() if heads.linear.transposed else turned).contiguous().to(weight.dtype)
    )
    renew(rewriter, heads.found.changed)
