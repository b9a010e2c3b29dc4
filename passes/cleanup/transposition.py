"""Weights stored the other way round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx, nn

from graphwright.ir.arguments import arguments_of
from graphwright.ir.names import op_name
from graphwright.ir.pattern import Match, Rule
from graphwright.ir.program import Program
from graphwright.ir.pruned import follow
from graphwright.ir.rewriter import Rewriter
from graphwright.ir.types import TensorType
from graphwright.passes.base import RulePass
from graphwright.passes.cleanup.linears import PRODUCTS, bias_objection


@dataclass(frozen=True, kw_only=True)
class TransposeLinears(RulePass):
    """Write products with a weight stored ``[in, out]`` as ``aten.linear``, with the weight stored ``[out, in]``.

    Before (GPT-2)::

        %y = aten.addmm(%bias, %x, %attn_c_attn_weight)

    After::

        %y = aten.linear(%x, %attn_c_attn_weight_transposed, %bias)

    The new weight is a copy: until the model the program was traced from is let go, both are in memory.

    Does not fire when

    - the weight is computed, or not a floating matrix of the input's dtype;
    - the weight is read by something else too, or has a further name (tied weights);
    - ``addmm`` has factors, or adds more than a bias ``[out]``.
    """

    name: ClassVar[str] = "transpose-linears"
    before: ClassVar[tuple[str, ...]] = ("quantize-linears",)
    near_miss: ClassVar[int] = 1

    def rules(self, program: Program) -> Sequence[Rule]:
        """One."""
        return [_Stored()]


class _Stored(Rule):
    """A product with a stored matrix."""

    name = "transpose-linears"

    def match(self, program: Program, node: fx.Node) -> Match | tuple[int, str]:
        names = PRODUCTS.get(op_name(node))
        if names is None:
            return -1, ""
        arguments = arguments_of(node)
        x, weight = arguments[names[0]], arguments[names[1]]
        if not isinstance(weight, fx.Node) or weight.op != "get_attr" or x.op == "get_attr":
            return -1, ""
        bias = arguments["self"] if op_name(node) == "aten.addmm" else None
        match = Match(program, node, {"x": x, "weight": weight, "bias": bias})
        match.inner = [node]
        return match

    def check(self, match: Match) -> str | None:
        program, weight = match.program, match.node("weight")
        kind, of = program.type_of(match.node("x")), program.type_of(weight)
        if not isinstance(kind, TensorType) or not isinstance(of, TensorType) or len(of.shape) != 2:
            return "the weight is not a matrix"
        if not of.dtype.is_floating_point or kind.dtype != of.dtype:
            return "the weight is not a floating matrix of the input's dtype"
        if len(weight.users) > 1:
            other = next(user for user in weight.users if user is not match.root)
            return f"{weight.target} is also read by %{other.name}"
        if weight.target in program.aliases.values():
            return f"{weight.target} is tied to a weight of another name"
        if match["bias"] is None:
            return None
        arguments = arguments_of(match.root)
        if arguments["beta"] != 1 or arguments["alpha"] != 1:
            return "addmm with factors other than 1"
        return bias_objection(program, match.node("bias"), TensorType(of.dtype, of.shape[::-1]))

    def rewrite(self, rewriter: Rewriter, match: Match) -> fx.Node:
        weight = match.node("weight")
        tensor = rewriter.program.tensor(weight)
        turned = tensor.detach().t().contiguous()
        stored: torch.Tensor = (
            nn.Parameter(turned, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else turned
        )
        made = rewriter.weight(f"{weight.target}_transposed", stored, like=weight)
        follow(rewriter.program, [str(weight.target)], str(made.target), turned)
        return rewriter.call("aten.linear", match.node("x"), made, match["bias"], like=match.root)
