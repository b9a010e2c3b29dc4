"""Feed-forward and attention blocks of a program, found by what their operators do, whatever they are called.

What counts is the graph: a feed-forward block is a linear whose input depends, through an activation, on linears that
read one value; an attention block is an attention with the linear behind it. Linears may be packed, and adapters may
lie beside them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from graphwright.ir.names import op_name
from graphwright.ir.pattern import Refusal
from graphwright.ir.program import Program
from graphwright.ir.provenance import tags_of
from graphwright.ir.types import VAL, fake_of
from graphwright.passes.adapters.sites import ADAPTER, Site, linear_site, refusal
from graphwright.passes.fusion.linears import attention_operands
from graphwright.passes.quantization.targets import is_head
from graphwright.passes.selection import Predicate

FEED_FORWARD = "feed_forward"
ATTENTION = "attention"

_ACTIVATIONS = frozenset(
    f"aten.{name}"
    for name in (
        *("celu", "elu", "erf", "gelu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "mish", "relu", "relu6"),
        *("selu", "sigmoid", "silu", "softplus", "tanh"),
    )
) | {"graphwright.gated_activation"}
# What may stand between the linears of a feed-forward block besides activations.
_BETWEEN = frozenset(
    f"aten.{name}"
    for name in (
        *("add.Tensor", "add.Scalar", "mul.Tensor", "mul.Scalar", "div.Tensor", "div.Scalar", "sub.Tensor", "neg"),
        *("pow.Tensor_Scalar", "square", "clamp", "dropout", "to.dtype", "to.device", "contiguous", "clone", "alias"),
        *("view", "reshape", "chunk", "split.Tensor", "split_with_sizes", "slice.Tensor", "layer_norm"),
    )
) | {"py.getitem", "graphwright.fake_quantize", "graphwright.rms_norm"}
# What may stand between an attention and the linear behind it.
_BEHIND = frozenset(
    f"aten.{name}"
    for name in (
        *(
            "view",
            "reshape",
            "transpose.int",
            "permute",
            "contiguous",
            "clone",
            "alias",
            "dropout",
            "flatten.using_ints",
        ),
        *("to.dtype", "to.device", "squeeze.dim", "unsqueeze", "mul.Tensor", "layer_norm"),
    )
) | {"py.getitem", "graphwright.fake_quantize", "graphwright.rms_norm"}
_ATTENTIONS = frozenset(
    {
        "aten.scaled_dot_product_attention",
        "graphwright.attention",
        "graphwright.attention_int8",
        "graphwright.cached_attention",
    }
)
_PRODUCTS = frozenset({"aten.matmul", "aten.bmm"})
_FARTHEST = 64


@dataclass(frozen=True)
class Block:
    """A block of a transformer.

    Attributes:
        kind: ``feed_forward`` or ``attention``.
        x: the value that its first linears read; for cross-attention, what the query is computed from.
        last: the linear whose value is the block's output, before dropout, norm and residual sum.
        first: the linears that read x: up, gate and up, or one for both; none for an attention.
        inner: the attention; ``None`` for a feed-forward block.
    """

    kind: str
    x: fx.Node
    last: Site
    first: tuple[fx.Node, ...] = ()
    inner: fx.Node | None = None


def block_sites(
    program: Program, selected: Predicate, kinds: Sequence[str] = (FEED_FORWARD,)
) -> Iterator[Site | Refusal]:
    """The blocks of a program as places for adapters: from ``x`` to the value of the last linear, whose path it has.

    Args:
        program: where.
        selected: what ``where=`` and ``ignore=`` leave; the last linear counts.
        kinds: ``feed_forward``, ``attention`` or both.
    """
    for node, found in blocks(program, kinds):
        if isinstance(found, str):
            yield refusal(node, found, 2)
            continue
        last = found.last
        out, into = last.features[0], int(fake_of(found.x).shape[-1])
        if not selected(node):
            yield refusal(node, "not selected by where= / ignore=")
        elif out != into:
            yield refusal(node, f"the block takes {into} features and gives {out}, so it is none with a residual sum")
        elif fake_of(found.x).shape[:-1] != fake_of(node).shape[:-1]:
            yield refusal(node, f"%{found.x.name} and %{node.name} differ in more than their features")
        else:
            yield Site(last.path, node, found.x, "", (out, into), last.dtype, op=found.kind)


def blocks(program: Program, kinds: Sequence[str] = (FEED_FORWARD, ATTENTION)) -> Iterator[tuple[fx.Node, Block | str]]:
    """Every block in order, with its last node; or what looks like one, and why it is none."""
    for node in program.nodes:
        if node.op != "call_function" or ADAPTER in tags_of(node):
            continue
        if FEED_FORWARD in kinds and (found := feed_forward_at(program, node)) is not None:
            yield node, found
        if ATTENTION in kinds and (attention := attention_at(program, node)) is not None:
            yield (attention.last.node if isinstance(attention, Block) else node), attention


def feed_forward_at(program: Program, last: fx.Node) -> Block | str | None:
    """The feed-forward block that ends at a linear, why there is none, or ``None`` where nothing looks like one.

    Args:
        program: where.
        last: any node.
    """
    site = linear_site(program, last)
    if not isinstance(site, Site):
        return None
    linears, activation, stranger = _linears_behind(program, site.x)
    if activation is None:
        return None
    if stranger is not None:
        # Most often a residual sum before a norm, which is no part of a block.
        return None if _leads_far(stranger) else f"%{last.name} depends on %{stranger.name}, which is no linear"
    if not linears or is_head(program, last):
        return None
    inputs = {_bare(item.x): None for item in linears}
    if len(inputs) > 1:
        return f"%{last.name} depends on linears that read different values"
    return Block(FEED_FORWARD, next(iter(inputs)), site, tuple(item.node for item in linears))


def attention_at(program: Program, inner: fx.Node) -> Block | str | None:
    """The attention block around an attention, why there is none, or ``None`` where a node is no attention.

    Args:
        program: where.
        inner: any node; one that is an attention counts, whole or as the product of probabilities and values.
    """
    query = _query(inner)
    if query is None:
        return None
    last = _linear_ahead(program, inner)
    if isinstance(last, str):
        return last
    linears, _, _ = _linears_behind(program, query, everything=True)
    inputs = {_bare(item.x): None for item in linears}
    if len(inputs) != 1:
        return f"the query of %{inner.name} depends on {len(inputs) or 'no'} linears, not on one"
    return Block(ATTENTION, next(iter(inputs)), last, (), inner)


def projections_at(program: Program, inner: fx.Node) -> tuple[Site, ...] | str | None:
    """The linears that give an attention its query, key and value: three, or the one for all.

    Args:
        program: where.
        inner: any node; one that is a whole attention counts.

    Returns:
        the linears, in order; why they are none that belong together; ``None`` where a node is no attention.
    """
    if op_name(inner) not in _ATTENTIONS:
        return None
    found: list[Site] = []
    for operand in attention_operands(inner):
        linears, _, _ = _linears_behind(program, operand, everything=True)
        if len(linears) != 1:
            return f"%{operand.name} depends on {len(linears) or 'no'} linears, not on one"
        found.append(linears[0])
    distinct = {site.node: site for site in found}
    if len({_bare(site.x) for site in found}) > 1:
        return "query, key and value read different values"
    if len(distinct) == 2:
        return "two of query, key and value come from one linear and the third from another"
    return tuple(distinct.values())


def _query(node: fx.Node) -> fx.Node | None:
    if op_name(node) in _ATTENTIONS:
        return _node(node.args[0])
    if op_name(node) not in _PRODUCTS:
        return None
    current: fx.Node | None = _node(node.args[0])
    steps = 0
    while current is not None and op_name(current) in _BEHIND | {"aten.expand"} and steps < _FARTHEST:
        current, steps = _node(current.args[0]), steps + 1
    if current is None or not op_name(current).startswith(("aten.softmax", "aten._softmax")):
        return None
    return _scores_query(current)


def _scores_query(softmax: fx.Node) -> fx.Node | None:
    """The left operand of the product that a softmax is over."""
    stack, seen = [softmax.args[0]], 0
    while stack and seen < _FARTHEST:
        node = stack.pop()
        seen += 1
        if not isinstance(node, fx.Node) or node.op != "call_function":
            continue
        if op_name(node) in (*_PRODUCTS, "aten.baddbmm"):
            return _node(node.args[1] if op_name(node) == "aten.baddbmm" else node.args[0])
        stack.extend(reversed([item for item in node.args if isinstance(item, fx.Node)]))
    return None


def _linear_ahead(program: Program, inner: fx.Node) -> Site | str:
    """The linear that an attention's value goes to."""
    found: dict[fx.Node, Site] = {}
    stack, seen = [inner], set[fx.Node]()
    while stack and len(seen) < _FARTHEST:
        node = stack.pop()
        for user in node.users:
            if user in seen:
                continue
            seen.add(user)
            site = linear_site(program, user)
            if isinstance(site, Site) and ADAPTER not in tags_of(user):
                found[user] = site
            elif op_name(user) in _BEHIND or (ADAPTER in tags_of(user) and user.args[0] is node):
                stack.append(user)
    if len(found) != 1:
        return f"the value of %{inner.name} goes to {len(found) or 'no'} linears, not to one"
    return next(iter(found.values()))


def _linears_behind(
    program: Program, value: fx.Node, *, everything: bool = False
) -> tuple[list[Site], fx.Node | None, fx.Node | None]:
    """The linears that a value is computed from, an activation on the way, and a node that does not belong there.

    Args:
        program: where.
        value: where to begin.
        everything: go through any operator, such as a rotary embedding.
    """
    linears: dict[fx.Node, Site] = {}
    activation: fx.Node | None = None
    seen: set[fx.Node] = set()
    stack: list[fx.Node] = [value]
    while stack:
        node = stack.pop()
        if node in seen or node.op == "get_attr":
            continue
        if len(seen) == _FARTHEST:
            return list(linears.values()), activation, node
        seen.add(node)
        if ADAPTER in tags_of(node):  # it leads back to the bare value
            stack.append(_bare(node))
            continue
        site = linear_site(program, node)
        if isinstance(site, Site):
            linears[node] = site
            continue
        name = op_name(node) if node.op == "call_function" else ""
        if name in _ACTIVATIONS:
            activation = activation or node
        elif node.op != "call_function" or (name not in _BETWEEN and not everything):
            if everything:
                continue
            return list(linears.values()), activation, node
        stack.extend(source for source in reversed(node.all_input_nodes) if _is_floating(source))
    return list(linears.values()), activation, None


def _bare(node: fx.Node) -> fx.Node:
    """The value without the adapters on it: first operands lead to it."""
    while ADAPTER in tags_of(node) and node.op == "call_function":
        first = node.args[0]
        assert isinstance(first, fx.Node)
        node = first
    return node


def _leads_far(node: fx.Node) -> bool:
    """Whether a node is at the end of a long way, or the start of the model, rather than inside a block."""
    return node.op == "placeholder" or op_name(node) in _ATTENTIONS | _PRODUCTS | _BETWEEN | {"aten.embedding"}


def _is_floating(node: fx.Node) -> bool:
    value: Any = node.meta.get(VAL)
    if isinstance(value, tuple | list):
        return True
    return getattr(getattr(value, "dtype", None), "is_floating_point", False)


def _node(value: Any) -> fx.Node | None:
    return value if isinstance(value, fx.Node) else None
