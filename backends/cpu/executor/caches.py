"""Attention over a cache as one instruction: rotation, writing into the cache and attending belong together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from graphwright.ir.arguments import arguments_of
from graphwright.ir.errors import BackendError
from graphwright.ir.names import op_name

ATTENTION = "graphwright.cached_attention"
_APPEND, _ROTARY = "graphwright.cache_append", "graphwright.rotary_embedding"


@dataclass(frozen=True)
class CacheStep:
    """What a ``cached_attention`` does together with the nodes before it.

    Attributes:
        attention: the node.
        query, key, value: of the new tokens; before their rotation where ``cos`` is not ``None``.
        cos, sin: of the rotation, or ``None``.
        keys, values: the inputs that are the caches.
        appends: the nodes that write into them.
        slots, starts: see :mod:`graphwright.ir.ops.cache`.
        interleaved: how the rotation pairs features.
        absorbed: nodes that need no instruction of their own.
    """

    attention: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    cos: fx.Node | None
    sin: fx.Node | None
    keys: fx.Node
    values: fx.Node
    appends: tuple[fx.Node, fx.Node]
    slots: fx.Node
    starts: fx.Node
    interleaved: bool
    absorbed: frozenset[fx.Node]


def cache_step(attention: fx.Node) -> CacheStep:
    """What can be done in one instruction.

    Raises:
        BackendError: the caches are not inputs that this attention alone writes and reads.
    """
    given = arguments_of(attention)
    written = [_append(attention, given[name], given) for name in ("keys", "values")]
    (keys, key), (values, value) = written
    query: fx.Node = given["query"]
    absorbed = {given["keys"], given["values"]}
    cos = sin = None
    interleaved = False
    rotations = [_rotation(each) for each in (query, key)]
    if rotations[0] is not None and rotations[1] is not None and _alike(rotations[0], rotations[1]):
        absorbed |= {query, key}
        cos, sin, interleaved = (rotations[0][name] for name in ("cos", "sin", "interleaved"))
        query, key = rotations[0]["x"], rotations[1]["x"]
    return CacheStep(
        attention,
        query,
        key,
        value,
        cos,
        sin,
        keys,
        values,
        (given["keys"], given["values"]),
        given["slots"],
        given["starts"],
        interleaved,
        frozenset(absorbed),
    )


def _append(attention: fx.Node, written: Any, given: dict[str, Any]) -> tuple[fx.Node, fx.Node]:
    """The cache and what is appended to it."""
    if isinstance(written, fx.Node) and written.op == "call_function" and op_name(written) == _APPEND:
        append = arguments_of(written)
        cache = append["cache"]
        own = all(append[name] is given[name] for name in ("slots", "starts"))
        alone = all(user is attention or user.op == "output" for user in written.users)
        if own and alone and cache.op == "placeholder" and list(cache.users) == [written]:
            return cache, append["new"]
    raise BackendError(
        "reads a cache that is not an input which this attention alone writes and reads",
        where=f"node %{attention.name}",
        hint="use target='reference'",
    )


def _rotation(node: Any) -> dict[str, Any] | None:
    """The arguments of a rotary embedding that nothing else reads."""
    if not isinstance(node, fx.Node) or node.op != "call_function" or op_name(node) != _ROTARY or len(node.users) != 1:
        return None
    return arguments_of(node)


def _alike(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a["cos"] is b["cos"] and a["sin"] is b["sin"] and bool(a["interleaved"] == b["interleaved"])
