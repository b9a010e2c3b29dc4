"""Virtual tokens: a program that computes on a sequence some places longer than the one it is given.

The inputs are padded in front, so positions, masks and everything else that depends on the sequence follow by
themselves, whatever model it is; what the padded places hold is overwritten by the adapter, and they are cut off the
outputs again.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from graphwright.ir.names import op_name
from graphwright.ir.program import Program
from graphwright.ir.provenance import tags_of
from graphwright.ir.rewriter import Rewriter
from graphwright.ir.types import TensorType
from graphwright.passes.adapters.builder import Builder
from graphwright.passes.adapters.inserted import LIMITS
from graphwright.passes.adapters.layers import layer_site
from graphwright.passes.adapters.sites import ADAPTER, Site

_SAME_IDS = frozenset(f"aten.{name}" for name in ("view", "reshape", "to.dtype", "to.device", "contiguous", "clone"))


@dataclass(frozen=True)
class TokenInputs:
    """The inputs of a program that have one number for each token.

    Attributes:
        site: the look-up of the tokens' embeddings.
        ids: the token ids ``[batch, sequence]``.
        others: further inputs ``[batch, sequence]``: mask, token types.
        dim: the name of the dimension.
    """

    site: Site
    ids: fx.Node
    others: tuple[fx.Node, ...]
    dim: str


def token_inputs(program: Program) -> TokenInputs | str:
    """The inputs that virtual tokens are put in front of, or why there can be none."""
    lookups: dict[fx.Node, Site] = {}
    for node in program.nodes:
        if op_name(node) == "graphwright.cached_attention":
            return "it decodes with a cache: put the virtual tokens into the model's own program, without cache"
        if op_name(node) not in ("aten.embedding", "graphwright.embedding_nbits") or ADAPTER in tags_of(node):
            continue
        site = layer_site(program, node)
        source = _input_behind(site.x) if isinstance(site, Site) else None
        if isinstance(site, Site) and source is not None:
            lookups.setdefault(source, site)
    named = [node for node in lookups if str(node.target) == "input_ids"]
    if len(named) != 1 and len(lookups) != 1:
        return f"{len(lookups) or 'no'} inputs are looked up in a table, and none of them is called input_ids"
    ids = named[0] if named else next(iter(lookups))
    kind = program.type_of(ids)
    if not isinstance(kind, TensorType) or len(kind.shape) != 2 or not isinstance(kind.shape[1], str):
        return f"the token ids are {kind}: the sequence has a fixed length (trace it with one that varies)"
    dim = kind.shape[1]
    involved = [text for text in program.symbols.conditions if dim in text]
    if involved:
        return f"the program holds only for sequences with {involved[0]}"
    others: list[fx.Node] = []
    for node in program.inputs:
        shape = getattr(program.type_of(node), "shape", ())
        if node is ids or dim not in shape:
            continue
        if tuple(shape) != tuple(kind.shape) or "position" in str(node.target):
            return f"the input {node.target} is {program.type_of(node)}, which cannot be made longer"
        others.append(node)
    return TokenInputs(lookups[ids], ids, tuple(others), dim)


def lengthen(builder: Builder, found: TokenInputs, count: int, longest: int | None = None) -> None:
    """Pad the inputs with ``count`` places in front, and cut these off the outputs.

    Masks have 1 there, token ids and types 0.

    Args:
        builder: of an adapter at the look-up.
        found: the inputs.
        count: of places.
        longest: limit on the sequence as it is given; ``None`` for none but the program's own, less the places.
    """
    program, rewriter = builder.rewriter.program, builder.rewriter
    most = program.dims[found.dim].max
    limits = [limit for limit in (longest, None if most is None else most - count) if limit is not None]
    before = {item: program.type_of(item) for item in _outputs(program)}
    if limits:
        bare = program.dims[found.dim]
        rewriter.limit(found.dim, min(limits))
        said = {"set": program.dims[found.dim].max, "max": bare.max, "hint": bare.hint}
        program.records.setdefault(LIMITS, {})[builder.name] = {found.dim: said}
    for node in (found.ids, *found.others):
        value = 1 if "mask" in str(node.target) else 0
        builder.adapt(node, builder.call("aten.constant_pad_nd", node, [count, 0], value), retyped=True)
    rewriter.retype()
    for item, old in before.items():
        new = program.type_of(item)
        if not isinstance(old, TensorType) or not isinstance(new, TensorType):
            continue
        cut = item
        for axis, (was, now) in enumerate(zip(old.shape, new.shape, strict=True)):
            if was != now:
                cut = builder.call("aten.slice.Tensor", cut, axis, count, 2**63 - 1)
        if cut is not item:
            users = {user for user in item.users if user.op != "output"}
            builder.adapt(item, cut, besides=users, retyped=True)


def shorten(rewriter: Rewriter, name: str) -> None:
    """Let a program take sequences as long as it did before :func:`lengthen`, if nothing else has limited them since.

    Args:
        rewriter: of a program whose nodes of the adapter are gone.
        name: of the adapter; one that set no limits changes nothing.
    """
    program = rewriter.program
    limits = program.records.get(LIMITS, {})
    for dim, said in limits.pop(name, {}).items():
        if dim in program.dims and program.dims[dim].max == said["set"]:
            rewriter.lift(dim, said["max"], said["hint"])
            rewriter.retype()
    if not limits:
        program.records.pop(LIMITS, None)


def in_front(builder: Builder, value: fx.Node, tensor: fx.Node, axis: int, count: int) -> fx.Node:
    """``value [batch, …]`` with a weight ``[1, …]`` in its first places along an axis, the same for the whole batch."""
    batch = builder.call("aten.sym_size.int", value, 0)
    spread = builder.call("aten.expand", tensor, [batch, *[-1] * (tensor.meta["val"].dim() - 1)])
    return builder.call("aten.slice_scatter", value, spread, axis, 0, count)


def _outputs(program: Program) -> list[fx.Node]:
    items = program.output.args[0]
    assert isinstance(items, tuple | list)
    return list(dict.fromkeys(item for item in items if isinstance(item, fx.Node)))


def _input_behind(node: fx.Node) -> fx.Node | None:
    while node.op == "call_function" and op_name(node) in _SAME_IDS:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        node = source
    return node if node.op == "placeholder" else None
