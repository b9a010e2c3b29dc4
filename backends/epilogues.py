"""What a kernel does besides its own node: what follows a linear, and the sum that a norm takes."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, replace

from torch import fx

from graphwright.ir.arguments import arguments_of
from graphwright.ir.names import op_name
from graphwright.ir.program import Program
from graphwright.ir.types import TensorType


@dataclass(frozen=True)
class Epilogue:
    """``activation(linear) * factor + residual``; what a program does not do is left out.

    Attributes:
        linear: the node whose kernel does it.
        absorbed: the nodes after it, in order; the last one's value is what the kernel gives.
        activation: empty or a name of :data:`graphwright.ir.ops.activation.ACTIVATIONS` or ``tanh``.
        factor: of the same shape, or of its last dimension alone.
        residual: likewise.
    """

    linear: fx.Node
    absorbed: tuple[fx.Node, ...] = ()
    activation: str = ""
    factor: fx.Node | None = None
    residual: fx.Node | None = None

    @property
    def last(self) -> fx.Node:
        """The node whose value the kernel gives."""
        return self.absorbed[-1] if self.absorbed else self.linear


def epilogue_of(program: Program, linear: fx.Node, taken: Set[fx.Node], before: tuple[fx.Node, ...] = ()) -> Epilogue:
    """The longest epilogue that a linear's kernel can take in.

    A node is taken in when it is the only user of the one before it, the order is that of :class:`Epilogue` and no
    other linear has ``taken`` it. Nodes ``before`` it the kernel does too, the last one's value after all of them.
    """
    found = Epilogue(linear, before)
    while len(found.last.users) == 1:
        (user,) = found.last.users
        longer = _with(program, found, user) if user.op == "call_function" and user not in taken else None
        if longer is None:
            return found
        found = longer
    return found


def sum_before(program: Program, norm: fx.Node, taken: Set[fx.Node]) -> fx.Node | None:
    """The sum ``x + residual`` that a norm takes, when its kernel can do it too.

    Both terms have the sum's type, no linear has ``taken`` it, and nothing uses it before the norm.
    """
    total = norm.all_input_nodes[0]
    if total.op != "call_function" or op_name(total) != "aten.add.Tensor" or total in taken:
        return None
    given = arguments_of(total)
    if given["alpha"] != 1 or not all(_alike(program, total, given[name]) for name in ("self", "other")):
        return None
    first = next(node for node in program.nodes if node in total.users)
    return total if first is norm else None


def _with(program: Program, before: Epilogue, node: fx.Node) -> Epilogue | None:
    name = op_name(node)
    plain = not before.activation and before.factor is None and before.residual is None
    longer = replace(before, absorbed=(*before.absorbed, node))
    if program.type_of(before.last) != program.type_of(node):
        return None
    if name in _ACTIVATIONS:
        activation = _ACTIVATIONS[name]
        if name == "aten.gelu" and arguments_of(node)["approximate"] == "tanh":
            activation = "gelu_tanh"
        return replace(longer, activation=activation) if plain else None
    if name == "graphwright.gated_activation":
        given = arguments_of(node)
        gate, up = given["gate"], given["up"]
        if not plain or gate is not before.last or up is gate or not _alike(program, node, up):
            return None
        return replace(longer, activation=given["activation"], factor=up)
    if name not in ("aten.mul.Tensor", "aten.add.Tensor"):
        return None
    given = arguments_of(node)
    others = [value for value in (given["self"], given["other"]) if value is not before.last]
    if len(others) != 1 or not (_alike(program, node, others[0]) or _is_row(program, node, others[0])):
        return None
    if name == "aten.mul.Tensor":
        return replace(longer, factor=others[0]) if before.factor is None and before.residual is None else None
    return replace(longer, residual=others[0]) if before.residual is None and given["alpha"] == 1 else None


def _alike(program: Program, node: fx.Node, other: object) -> bool:
    """Whether an operand has the very type of the result: nothing is broadcast or promoted."""
    return isinstance(other, fx.Node) and program.type_of(other) == program.type_of(node)


def _is_row(program: Program, node: fx.Node, other: object) -> bool:
    """Whether an operand is a vector over the result's last dimension, the same for every row."""
    own, kind = program.type_of(node), program.type_of(other) if isinstance(other, fx.Node) else None
    if not isinstance(own, TensorType) or not isinstance(kind, TensorType) or not own.shape:
        return False
    return kind.shape == own.shape[-1:] and kind.dtype == own.dtype


_ACTIVATIONS = {"aten.relu": "relu", "aten.silu": "silu", "aten.gelu": "gelu", "aten.tanh": "tanh"}
