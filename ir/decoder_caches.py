"""Giving a decoding step other layers: its caches in order, among inputs and outputs, without gaps."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import fx
from torch.utils import _pytree as pytree

from graphwright.ir.decoder import DecoderLayout
from graphwright.ir.errors import ProgramError
from graphwright.ir.rewriter import Rewriter
from graphwright.ir.stacks import Layer
from graphwright.ir.types import VAL

# Inputs that are no caches: input_ids, slots, starts, rows.
_OTHERS = 4


@dataclasses.dataclass(frozen=True)
class Cache:
    """The cache of one layer.

    Attributes:
        keys: its input.
        values: likewise.
        new_keys: what the step gives back for it.
        new_values: likewise.
    """

    keys: fx.Node
    values: fx.Node
    new_keys: fx.Node
    new_values: fx.Node


def caches_of(layout: DecoderLayout, inputs: Sequence[fx.Node], results: Sequence[Any]) -> list[Cache]:
    """The caches of a decoding step, in order.

    Raises:
        ProgramError: it has inputs or outputs behind the caches.
    """
    count = layout.layers
    if len(inputs) != _OTHERS + 2 * count or len(results) != 1 + 2 * count:
        raise ProgramError(
            "the decoding step has inputs or outputs besides its caches, so its layers stay as they are",
            hint="change its layers before passes that add some (GateAdapters, ClassifyRepetitions)",
        )
    keys, values = inputs[_OTHERS : _OTHERS + count], inputs[_OTHERS + count :]
    new_keys, new_values = results[1 : 1 + count], results[1 + count :]
    return [Cache(*each) for each in zip(keys, values, new_keys, new_values, strict=True)]


def cache_within(layer: Layer, caches: Sequence[Cache]) -> Cache | None:
    """The one cache that a layer reads; ``None`` if it has none.

    Raises:
        ProgramError: it reads several.
    """
    read = set(layer.inputs)
    found = [cache for cache in caches if cache.keys in read or cache.values in read]
    if len(found) > 1:
        raise ProgramError("a layer reads the caches of several", where=f"%{layer.exit.name} in {layer.path}")
    return found[0] if found else None


def add_cache(rewriter: Rewriter, like: Cache) -> tuple[fx.Node, fx.Node]:
    """Inputs for one more cache of the same shape; :func:`arrange_caches` gives them their names and places."""
    graph = rewriter.program.graph
    made: list[fx.Node] = []
    for old in (like.keys, like.values):
        with graph.inserting_after(rewriter.program.inputs[-1]):
            node = graph.placeholder(f"{old.name}_more")
        node.meta = {**old.meta, VAL: old.meta[VAL]}
        made.append(node)
    rewriter.changed = True
    return made[0], made[1]


def arrange_caches(rewriter: Rewriter, caches: Sequence[Cache]) -> None:
    """Let a decoding step have exactly these caches, in this order, named by it, as inputs and as outputs.

    Inputs of other caches are removed; nothing may read them any more.

    Raises:
        ProgramError: a removed cache is still read.
    """
    program = rewriter.program
    graph, inputs = program.graph, program.inputs
    results = program.results
    wanted = [*(each.keys for each in caches), *(each.values for each in caches)]
    program.output.args = ((results[0], *(each.new_keys for each in caches), *(each.new_values for each in caches)),)
    for node in inputs[_OTHERS:]:
        if node in wanted:
            continue
        _erase_unread(rewriter, node)
    last = inputs[_OTHERS - 1]
    for node in wanted:
        last.append(node)
        last = node
    names = [f"{kind}_{layer}" for kind in ("keys", "values") for layer in range(len(caches))]
    for node, name in zip(wanted, names, strict=True):
        node.name, node.target = f"{name}_being_named", name
    taken = {node.name for node in graph.nodes}
    for node, name in zip(wanted, names, strict=True):
        if name in taken:
            raise ProgramError(f"the name %{name} is taken by another node", where=f"program {program.title!r}")
        node.name = name
    _resign(rewriter, len(caches), names)
    program.kept["inputs"] = {**program.kept.get("inputs", {}), **dict.fromkeys(names, 0.0)}
    rewriter.changed = True


def _erase_unread(rewriter: Rewriter, node: fx.Node) -> None:
    for user in list(node.users):
        if user.users:
            raise ProgramError(f"the cache %{node.name} is still read, by way of %{user.name}")
        rewriter.erase(user)
    rewriter.program.graph.erase_node(node)


def _resign(rewriter: Rewriter, layers: int, names: list[str]) -> None:
    """The signature of a step with other caches."""
    program = rewriter.program
    signature = program.signature
    args, kwargs = pytree.tree_unflatten(list(signature.inputs), signature.in_spec)
    kwargs = {**kwargs, "keys": names[:layers], "values": names[layers:]}
    leaves, in_spec = pytree.tree_flatten((args, kwargs), is_leaf=lambda each: each is None)
    given = pytree.tree_unflatten(list(range(signature.out_spec.num_leaves)), signature.out_spec)
    keys = list(range(1, 1 + layers))
    given = {**given, "keys": keys, "values": [each + layers for each in keys]}
    program.signature = dataclasses.replace(
        signature, in_spec=in_spec, out_spec=pytree.tree_structure(given), inputs=tuple(leaves)
    )
