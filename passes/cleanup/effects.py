"""What may be removed, merged or computed ahead of time: effects and randomness of operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphwright.ir.arguments import arguments_of
from graphwright.ir.names import op_name

# Checks that torch.export leaves behind. They compute nothing; sizes are checked when a program is called.
ASSERTIONS = frozenset(
    {
        "aten._assert_tensor_metadata",
        "aten._assert_scalar",
        "aten._assert_async",
        "aten._assert_async.msg",
        "aten.sym_constrain_range",
        "aten.sym_constrain_range_for_size",
    }
)

_DROPOUTS = frozenset({"aten.dropout", "aten.alpha_dropout", "aten.feature_dropout", "aten.feature_alpha_dropout"})


def is_assertion(node: fx.Node) -> bool:
    """Whether the node only checks something."""
    return op_name(node) in ASSERTIONS


def is_idle_dropout(node: fx.Node) -> bool:
    """Whether the node is a dropout that drops nothing."""
    if op_name(node) not in _DROPOUTS:
        return False
    arguments = arguments_of(node)
    return arguments["train"] is False or arguments["p"] == 0


def is_random(node: fx.Node) -> bool:
    """Whether two evaluations of the node may differ."""
    target: Any = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    if target._schema.name.split("::")[-1].startswith(("empty", "new_empty")):
        return True
    if torch.Tag.nondeterministic_seeded not in target.tags or is_idle_dropout(node):
        return False
    # Attention is tagged because it can drop weights at random; mostly it does not.
    return bool(arguments_of(node).get("dropout_p", 1.0))


def is_pure(node: fx.Node) -> bool:
    """Whether the node is a call whose only effect is its value, which its operands determine."""
    if node.op != "call_function" or is_assertion(node) or is_random(node):
        return False
    target: Any = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return True  # arithmetic on sizes, taking tuples apart
    return not target._schema.is_mutable and len(target._schema.returns) > 0
