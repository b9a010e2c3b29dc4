"""In-place operators made functional where that is plain to see; otherwise the whole graph is left to torch's own way.

Most models that write in place do so on a value nobody else looks at any more: ``nn.ReLU(inplace=True)``,
``scores += position_bias``. Those become the functional operator of the same name, and every other node keeps its
spelling, which the fusion patterns know. Where views of the written tensor are read later,
``ExportedProgram.run_decompositions`` does it right, at the price of other spellings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from graphwright.ir.arguments import schema_of
from graphwright.ir.errors import TraceError

_FRESH = torch.ops.aten.lift_fresh_copy.default


def writes(node: fx.Node) -> bool:
    """Whether the node writes into one of its operands."""
    schema = schema_of(node)
    return schema is not None and schema.is_mutable


def make_functional(graph: fx.Graph, lifted: Mapping[str, str], place: Callable[[fx.Node], str]) -> bool:
    """Replace in-place operators by functional ones; gives ``False`` if one is left that needs torch's own way.

    Args:
        graph: torch.export's graph, flat calls; changed in place.
        lifted: names of weights by the name of the placeholder that stands for them.
        place: gives module path and line of a node, for messages.

    Raises:
        TraceError: the model writes into an input, a parameter or a buffer.
    """
    done = True
    for node in list(graph.nodes):
        if node.op != "call_function" or not writes(node):
            continue
        aliases = _aliases(graph, node.args[0])
        root = next((alias for alias in aliases if alias.op in ("placeholder", "get_attr")), None)
        if root is not None:
            raise write_refused(lifted.get(root.name, str(root.target)), place(node))
        done = _replace(graph, node, aliases) and done
    return done


def write_refused(name: str, where: str) -> TraceError:
    """The error for a model that changes its inputs or its own state."""
    return TraceError(
        f"the model writes into {name!r}, an input or state of its own, while it runs",
        where=where,
        hint="a Program computes outputs only: work on a copy (x = x.clone()), or return the new state as an output",
    )


def _storage(node: fx.Node) -> Any:
    value = node.meta.get("val")
    return value.untyped_storage()._cdata if isinstance(value, torch.Tensor) else None


def _aliases(graph: fx.Graph, node: Any) -> list[fx.Node]:
    storage = _storage(node)
    found = [other for other in graph.nodes if other is node or (storage is not None and _storage(other) == storage)]
    # torch.tensor([...]) in a forward is a fresh copy at each call, which its fake value does not show.
    return [alias for alias in found if not alias.users or not all(user.target is _FRESH for user in alias.users)]


def _replace(graph: fx.Graph, node: fx.Node, aliases: list[fx.Node]) -> bool:
    written: Any = node.args[0]
    function = _functional(node)
    if function is None:
        return False
    for alias in aliases:
        if alias in (written, node) or alias > node:
            continue
        if any(user > node for user in alias.users):
            return False  # a view made before is read after the write
    before, after = written.meta["val"], node.meta["val"]
    if before.dtype != after.dtype or before.shape != after.shape:
        return False
    with graph.inserting_before(node):
        new = graph.call_function(function, node.args, node.kwargs)
    new.meta = dict(node.meta)
    if not _keeps_type(new):
        graph.erase_node(new)
        return False
    node.replace_all_uses_with(new)
    written.replace_all_uses_with(new, delete_user_cb=lambda user: user > node)
    graph.erase_node(node)
    return True


def _functional(node: fx.Node) -> Any:
    """``aten.add.Tensor`` for ``aten.add_.Tensor``, if it takes the same arguments."""
    target: Any = node.target
    schema = target._schema
    namespace, _, name = schema.name.partition("::")
    if not name.endswith("_") or name.endswith("__"):
        return None
    packet = getattr(getattr(torch.ops, namespace), name[:-1], None)
    found = getattr(packet, target._overloadname, None)
    if found is None or found._schema.is_mutable:
        return None
    ours = [(item.name, str(item.type)) for item in schema.arguments]
    return found if [(item.name, str(item.type)) for item in found._schema.arguments] == ours else None


def _keeps_type(node: fx.Node) -> bool:
    """In-place operators keep the dtype of what they write into; functional ones promote."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: source.meta["val"])
    expected = node.meta["val"]
    target: Any = node.target
    with expected.fake_mode, torch.no_grad():
        value = target(*args, **kwargs)
    return isinstance(value, torch.Tensor) and value.dtype == expected.dtype and value.shape == expected.shape
