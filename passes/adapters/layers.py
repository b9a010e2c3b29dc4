"""Layers beside which an adapter can lie: linears, embeddings and convolutions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import fx

from graphwright.ir.arguments import arguments_of
from graphwright.ir.errors import InputError
from graphwright.ir.names import op_name
from graphwright.ir.pattern import Refusal
from graphwright.ir.program import Program
from graphwright.ir.provenance import path_of
from graphwright.ir.types import VAL
from graphwright.passes.adapters.sites import Site, linear_site, sites_by
from graphwright.passes.selection import Predicate

OPS = ("linear", "embedding", "conv")
_CONVOLUTIONS = ("aten.conv1d", "aten.conv2d", "aten.conv3d")


def layer_sites(
    program: Program, selected: Predicate, ops: Sequence[str], *, kind: str, head: bool = False
) -> Iterator[Site | Refusal]:
    """Every layer of some ops that is selected and is no part of an adapter.

    Args:
        program: where.
        selected: the pass's choice.
        ops: of :data:`OPS`; selected layers of others say that they are left out.
        kind: that asks, for the reason.
        head: the output head too.
    """
    return sites_by(layer_site, program, selected, head=head, ops=ops, kind=kind)


def layer_site(program: Program, node: fx.Node) -> Site | str | None:
    """The layer at a node, why it cannot be adapted, or ``None`` where there is none."""
    name = op_name(node)
    if name in ("aten.embedding", "graphwright.embedding_nbits"):
        return _embedding(program, node)
    if name in _CONVOLUTIONS:
        return _convolution(program, node)
    return linear_site(program, node)


def check_ops(kind: str, ops: object, known: Sequence[str] = OPS) -> tuple[str, ...]:
    """The option ``ops`` of a kind, as a tuple.

    Raises:
        InputError: it is empty or has a word that is none of ``known``.
    """
    given = (ops,) if isinstance(ops, str) else ops
    if not isinstance(given, tuple | list) or not given or any(op not in known for op in given):
        raise InputError(f"must be some of {', '.join(known)}, not {ops!r}", where=f"{kind}: ops")
    return tuple(given)


def _embedding(program: Program, node: fx.Node) -> Site | str:
    given, value = arguments_of(node), node.meta[VAL]
    weight = given.get("weight")
    if weight is None:  # packed; its rows are not known to the operator, only to the codes
        rows = int(given["qweight"].meta[VAL].shape[0])
    elif weight.op != "get_attr":
        return f"its weight is computed by %{weight.name}, not a constant"
    else:
        rows = int(weight.meta[VAL].shape[0])
    features = (int(value.shape[-1]), rows)
    return Site(
        path_of(node), node, given["indices"], "indices", features, value.dtype, weight, op="embedding", program=program
    )


def _convolution(program: Program, node: fx.Node) -> Site | str:
    given, value = arguments_of(node), node.meta[VAL]
    weight, x = given["weight"], given["input"]
    if weight.op != "get_attr":
        return f"its weight is computed by %{weight.name}, not a constant"
    shape = [int(size) for size in weight.meta[VAL].shape]
    groups = int(given["groups"])
    return Site(
        path_of(node),
        node,
        x,
        "input",
        (shape[0], shape[1] * groups),
        value.dtype,
        weight,
        given["bias"],
        op="conv",
        kernel=tuple(shape[2:]),
        groups=groups,
        program=program,
    )
