"""How operators are written: ``aten.linear``, ``aten.add.Tensor``, ``graphwright.rms_norm``, ``getitem``."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import fx

from graphwright.ir.errors import ProgramError

# Python functions torch.export leaves in a graph: taking tuples apart and arithmetic on sizes.
PYTHON_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "getitem": operator.getitem,
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "floordiv": operator.floordiv,
    "truediv": operator.truediv,
    "mod": operator.mod,
    "neg": operator.neg,
    "pow": operator.pow,
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "and_": operator.and_,
    "or_": operator.or_,
    "not_": operator.not_,
    "trunc": math.trunc,
    "ceil": math.ceil,
    "floor": math.floor,
    "sym_max": torch.sym_max,
    "sym_min": torch.sym_min,
    "sym_int": torch.sym_int,
    "sym_float": torch.sym_float,
    "sym_not": torch.sym_not,
    "sym_ite": torch.sym_ite,
}
_PYTHON_NAMES: dict[Any, str] = {function: name for name, function in PYTHON_FUNCTIONS.items()}


def check_weight_name(name: str) -> None:
    """Check that a weight may have this name: parts joined by dots, such as ``encoder.layer.0.weight``.

    torch.fx writes names into the Python code it compiles, so nothing that ends a string may stand in one.

    Raises:
        ProgramError: it may not.
    """
    if not all(part.isprintable() and part and not set(part) & set('"\\') for part in name.split(".")):
        raise ProgramError(f"{name!r} is not a weight's name", hint="such as encoder.layer.0.weight")


def target_name(target: Any) -> str:
    """The written name of a call target.

    Raises:
        ProgramError: the target is something a Program cannot hold.
    """
    if isinstance(target, torch._ops.OpOverload):
        namespace, _, name = target._schema.name.partition("::")
        overload = target._overloadname
        return f"{namespace}.{name}" if overload == "default" else f"{namespace}.{name}.{overload}"
    if target in _PYTHON_NAMES:
        return f"py.{_PYTHON_NAMES[target]}"
    raise ProgramError(f"{target!r} cannot stand in a Program", hint="use an ATen operator or a dialect operator")


def op_name(node: fx.Node) -> str:
    """The written name of what a node calls; ``get_attr``, ``placeholder`` and ``output`` for the other kinds."""
    return target_name(node.target) if node.op == "call_function" else node.op


def resolve_target(name: str) -> Callable[..., Any]:
    """The call target of a written name; dialect operators are registered on first use.

    Raises:
        ProgramError: there is no such operator.
    """
    namespace, _, rest = name.partition(".")
    if namespace == "py" and rest in PYTHON_FUNCTIONS:
        return PYTHON_FUNCTIONS[rest]
    if namespace == "graphwright":
        from graphwright.ir import ops

        return ops.get(rest).target
    base, _, overload = rest.partition(".")
    packet = getattr(getattr(torch.ops, namespace, None), base, None) if base else None
    found = getattr(packet, overload or "default", None) if packet is not None else None
    # Not everything below torch.ops is an operator: a name in a file must not reach torch.ops.load_library.
    if not isinstance(found, torch._ops.OpOverload):
        raise ProgramError(
            f"no operator is named {name!r}",
            hint="ATen names are written aten.<op> or aten.<op>.<overload>; other packages' operators need an import",
        )
    return cast(Callable[..., Any], found)
