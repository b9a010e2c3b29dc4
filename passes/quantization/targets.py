"""Which linears and embeddings can be quantised, and why others cannot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from graphwright.ir.arguments import arguments_of
from graphwright.ir.names import op_name
from graphwright.ir.program import Program
from graphwright.ir.provenance import path_of
from graphwright.ir.types import TensorType

# A head is a linear whose module goes by one of these names, or whose output leaves the program as ``logits``.
_HEAD_NAMES = ("lm_head", "embed_out", "output_projection")
_PASSES_THROUGH = (
    "aten.view",
    "aten.reshape",
    "aten.slice.Tensor",
    "aten.to.dtype",
    "aten.contiguous",
    "aten.mul.Tensor",
)

_HELD = "graphwright.apply_mask"

# Floats a weight may have. Float64 models are quantised only when converted first: their users want the digits.
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class LinearTarget:
    """One linear: ``x W + b`` in any of the spellings ATen has for it.

    Attributes:
        node: the node to replace.
        x: input ``[..., in]``.
        weight: the ``get_attr`` node of the weight.
        bias: node of the bias ``[out]``, or ``None``.
        transposed: the weight is stored ``[in, out]``.
    """

    node: fx.Node
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    transposed: bool


def linear_target(program: Program, node: fx.Node) -> LinearTarget | str | None:
    """The linear at a node, the reason why it cannot be quantised, or ``None`` when it is no linear at all."""
    name, arguments = op_name(node), arguments_of(node)
    if name == "aten.linear":
        found = LinearTarget(node, arguments["input"], arguments["weight"], arguments["bias"], False)
    elif name == "aten.addmm":
        if arguments["beta"] != 1 or arguments["alpha"] != 1:
            return "addmm with factors other than 1"
        found = LinearTarget(node, arguments["mat1"], arguments["mat2"], arguments["self"], True)
    elif name in ("aten.mm", "aten.matmul"):
        other = arguments.get("mat2", arguments.get("other"))
        if not isinstance(other, fx.Node) or other.op != "get_attr":
            return None  # a product of two computed values is no linear
        found = LinearTarget(node, arguments["self"], other, None, True)
    else:
        return None
    return _objection(program, found) or found


def _objection(program: Program, target: LinearTarget) -> str | None:
    if target.weight.op != "get_attr":
        held = " (its mask is held: ReleaseMasks lets go of it)" if op_name(target.weight) == _HELD else ""
        return f"its weight is computed by %{target.weight.name}, not a constant{held}"
    weight = program.tensor(target.weight)
    if weight.dim() != 2:
        return f"its weight has {weight.dim()} dimensions"
    if weight.dtype not in _FLOATS:
        return f"its weight is {weight.dtype}"
    kind = program.type_of(target.x)
    if not isinstance(kind, TensorType) or kind.dtype != weight.dtype:
        return "its input and weight differ in dtype"
    if target.bias is not None:
        bias = program.type_of(target.bias)
        if not isinstance(bias, TensorType) or len(bias.shape) != 1:
            return "its bias is not a vector"
    return None


def half_shared(program: Program, targets: Sequence[LinearTarget]) -> dict[fx.Node, str]:
    """Linears whose weight something else reads too that would keep it in floating point, and the reason in words.

    Quantising such a linear would leave the program with both forms of the weight.
    """
    form = {target.node: (str(target.weight.target), target.transposed) for target in targets}
    readers: dict[str, list[fx.Node]] = {}
    for node in program.nodes:
        if node.op == "get_attr":
            readers.setdefault(str(node.target), []).extend(node.users)
    reasons: dict[fx.Node, str] = {}
    for target in targets:
        others = [user for user in readers[form[target.node][0]] if form.get(user) != form[target.node]]
        if not others:
            continue
        reason = f"its weight is also read by %{others[0].name}, which is not quantised, and would be stored twice"
        if op_name(others[0]) == "aten.embedding":
            reason += " (QuantizeEmbeddings(tied=True) quantises a table and the head tied to it)"
        reasons[target.node] = reason
    return reasons


def is_head(program: Program, node: fx.Node) -> bool:
    """Whether a linear gives the model's logits: by its module's name, or because its value leaves as ``logits``."""
    if path_of(node).rsplit(".", 1)[-1] in _HEAD_NAMES:
        return True
    items = program.output.args[0]
    assert isinstance(items, tuple | list)
    logits = {item for item, name in zip(items, program.signature.output_names(), strict=True) if name == "logits"}
    current = node
    while current not in logits:
        users = list(current.users)
        if len(users) != 1 or op_name(users[0]) not in _PASSES_THROUGH:
            return False
        current = users[0]
    weight = arguments_of(node).get("weight")
    wide = isinstance(weight, fx.Node) and weight.op == "get_attr" and program.tensor(weight).shape[0] >= 1000
    return wide


def embedding_objection(program: Program, node: fx.Node, *, tied: bool) -> str | None:
    """Why an ``aten.embedding`` cannot be quantised, or ``None``."""
    arguments = arguments_of(node)
    table = arguments["weight"]
    if table.op != "get_attr":
        return f"its table is computed by %{table.name}, not a constant"
    if program.tensor(table).dtype not in _FLOATS:
        return f"its table is {program.tensor(table).dtype}"
    if arguments["scale_grad_by_freq"] or arguments["sparse"]:
        return "it trains with options that a quantised table does not have"
    others = [user for user in table.users if op_name(user) != "aten.embedding"]
    if others and not tied:
        return (
            f"its table is tied to %{others[0].name}: quantising one of them alone would store it twice "
            "(set tied=True to quantise both)"
        )
    for user in others:
        found = linear_target(program, user)
        if not isinstance(found, LinearTarget) or found.transposed or found.weight is not table:
            return f"its table is also read by %{user.name}, which is not a linear"
    return None
