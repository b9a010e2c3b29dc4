"""Where adapters go: places of a program with an input, a value and mostly a weight between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from graphwright.ir.arguments import arguments_of
from graphwright.ir.names import op_name
from graphwright.ir.pattern import Refusal
from graphwright.ir.program import Program
from graphwright.ir.provenance import path_of, tags_of
from graphwright.ir.types import VAL
from graphwright.passes.quantization.targets import LinearTarget, is_head, linear_target
from graphwright.passes.selection import Predicate

ADAPTER = "adapter"

# linears on weights that are packed -> the operand that is the input; all have the bias as "bias"
PACKED_LINEARS: dict[str, str] = {
    "graphwright.linear_codebook": "x",
    "graphwright.linear_fp8_dynamic": "x",
    "graphwright.linear_int8_dynamic": "x",
    "graphwright.linear_int8_static": "x",
    "graphwright.linear_nbits": "x",
    "graphwright.linear_nbits_dynamic": "x",
}


@dataclass(frozen=True)
class Site:
    """A place for an adapter.

    Attributes:
        path: module path, by which saved adapters find it again.
        node: gives the value that is adapted.
        x: the input, a node.
        input_name: the name of ``node``'s argument that is the input; empty where the site is more than one node.
        features: ``(out, in)``; of an embedding ``(dim, rows)``, of a convolution its channels.
        dtype: of input and value.
        weight: the ``get_attr`` node of the weight, ``None`` where it is packed or there is none.
        bias: node of the bias, or ``None``.
        transposed: the weight is stored ``[in, out]``.
        op: ``linear``, ``embedding``, ``conv``, or what a kind calls its own sites.
        extra: further nodes by name, for kinds whose sites are of several.
        kernel: sizes of a convolution's kernel.
        groups: of a convolution.
        program: that has the weight's values, for kinds that start from them.
    """

    path: str
    node: fx.Node
    x: fx.Node
    input_name: str
    features: tuple[int, int]
    dtype: torch.dtype
    weight: fx.Node | None = None
    bias: fx.Node | None = None
    transposed: bool = False
    op: str = "linear"
    extra: tuple[tuple[str, fx.Node], ...] = ()
    kernel: tuple[int, ...] = ()
    groups: int = 1
    program: Program | None = field(default=None, compare=False, repr=False)

    @property
    def packed(self) -> bool:
        """Whether the weight is stored as codes."""
        return self.weight is None

    def dense(self) -> torch.Tensor:
        """The weight ``[out, in]`` of a linear, as it is or as its codes stand for it; not to be written into."""
        assert self.program is not None
        assert self.op == "linear"
        if self.weight is not None:
            stored = self.program.tensor(self.weight).detach()
            return stored.t() if self.transposed else stored
        # Whatever the codes' format is, the operator knows it: the outputs of unit vectors are the columns.
        given = {
            key: self.program.tensor(value).detach() if isinstance(value, fx.Node) and value is not self.x else value
            for key, value in arguments_of(self.node).items()
        }
        given |= {self.input_name: torch.eye(self.features[1], dtype=self.dtype), "bias": None}
        with torch.no_grad():
            columns: torch.Tensor = self.node.target(**given)  # type: ignore[operator]
        return columns.t()

    def shapes(self) -> dict[str, Any]:
        """What a saved adapter remembers of it, to be compared with the model it is put into."""
        shapes: dict[str, Any] = {"op": self.op, "features": list(self.features)}
        return {**shapes, "kernel": list(self.kernel), "groups": self.groups} if self.op == "conv" else shapes


def linear_sites(program: Program, selected: Predicate, *, head: bool = False) -> Iterator[Site | Refusal]:
    """Every linear, on float or packed weights, that is selected and is no part of an adapter.

    Args:
        program: where.
        selected: the pass's choice.
        head: the output head too.
    """
    return sites_by(linear_site, program, selected, head=head)


def sites_by(
    look: Callable[[Program, fx.Node], Site | str | None],
    program: Program,
    selected: Predicate,
    *,
    head: bool,
    ops: Sequence[str] | None = None,
    kind: str = "",
) -> Iterator[Site | Refusal]:
    """Every place that is selected and is no part of an adapter.

    Args:
        look: the place at a node, why it cannot be adapted, or ``None`` where there is none.
        program: where.
        selected: the pass's choice.
        head: the output head too.
        ops: of the places; selected ones of others say that they are left out. ``None`` for any.
        kind: that has these ops, for the reason.
    """
    for node in program.nodes:
        if node.op != "call_function" or ADAPTER in tags_of(node):
            continue
        found = look(program, node)
        if found is None:
            continue
        reason = found if isinstance(found, str) else None
        if not selected(node):
            reason = "not selected by where= / ignore="
        elif isinstance(found, Site) and ops is not None and found.op not in ops:
            reason = f"{found.op} layers are not among the ops={tuple(ops)} of {kind}"
        elif not head and is_head(program, node):
            reason = "it is the output head, which is left alone (name it in where= to adapt it)"
        yield found if isinstance(found, Site) and reason is None else refusal(node, str(reason))


def linear_site(program: Program, node: fx.Node) -> Site | str | None:
    """The linear at a node, why it cannot be adapted, or ``None`` where there is none."""
    name = op_name(node)
    if name in PACKED_LINEARS:
        given, input_name = arguments_of(node), PACKED_LINEARS[name]
        x, bias = given[input_name], given["bias"]
        dtype = node.meta[VAL].dtype
        return Site(path_of(node), node, x, input_name, _features(node, x), dtype, None, bias, program=program)
    found = linear_target(program, node)
    if not isinstance(found, LinearTarget):
        return found
    features = _features(node, found.x)
    input_name = {"aten.linear": "input", "aten.addmm": "mat1"}.get(name, "self")
    return Site(
        path_of(node),
        node,
        found.x,
        input_name,
        features,
        node.meta[VAL].dtype,
        found.weight,
        found.bias,
        found.transposed,
        program=program,
    )


def refusal(node: fx.Node, reason: str, depth: int = 1) -> Refusal:
    """A place that is left alone, and why."""
    return Refusal("insert-adapters", node.name, path_of(node), reason, depth)


def _features(node: fx.Node, x: fx.Node) -> tuple[int, int]:
    return int(node.meta[VAL].shape[-1]), int(x.meta[VAL].shape[-1])
