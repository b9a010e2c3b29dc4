"""One spelling for linears."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from graphwright.ir.arguments import arguments_of
from graphwright.ir.names import op_name
from graphwright.ir.pattern import Match, Rule
from graphwright.ir.program import Program
from graphwright.ir.rewriter import Rewriter
from graphwright.ir.types import TensorType
from graphwright.passes.base import RulePass
from graphwright.passes.cleanup.views import permutation

# operator -> its operands: rows and matrix
PRODUCTS = {"aten.mm": ("self", "mat2"), "aten.matmul": ("self", "other"), "aten.addmm": ("mat1", "mat2")}


@dataclass(frozen=True, kw_only=True)
class CanonicalizeLinears(RulePass):
    """Write products with a transposed weight, and a bias added to them, as ``aten.linear``.

    Before::

        %turned = aten.numpy_T(%weight)
        %product = aten.matmul(%x, %turned)
        %y = aten.add.Tensor(%product, %bias)

    After::

        %y = aten.linear(%x, %weight, %bias)

    What fuses and quantises linears, and what runs them, then sees them all. Products with a weight stored
    ``[in, out]`` (GPT-2) stay as they are; :class:`TransposeLinears` has those.

    Does not fire when

    - the weight is computed, or not a floating matrix of the input's dtype;
    - ``addmm`` has factors, or adds more than a bias ``[out]``;
    - (bias) the product without it is used elsewhere too, or the sum broadcasts it, scales it, or changes the dtype.
    """

    name: ClassVar[str] = "canonicalize-linears"

    def rules(self, program: Program) -> Sequence[Rule]:
        """The product, then its bias."""
        return [_Product(), _Bias()]


class _Product(Rule):
    """``x Wᵀ`` by another name."""

    name = "canonicalize-linears: product"

    def match(self, program: Program, node: fx.Node) -> Match | tuple[int, str]:
        names = PRODUCTS.get(op_name(node))
        if names is None:
            return -1, ""
        arguments = arguments_of(node)
        x, turned = arguments[names[0]], arguments[names[1]]
        if not isinstance(turned, fx.Node) or permutation(program, turned) != (1, 0):
            return -1, ""
        source = turned.args[0]
        assert isinstance(source, fx.Node)
        bias = arguments["self"] if op_name(node) == "aten.addmm" else None
        match = Match(program, node, {"x": x, "weight": source, "bias": bias})
        match.inner = [node]  # the transposed weight may serve others too
        return match

    def check(self, match: Match) -> str | None:
        program, weight = match.program, match.node("weight")
        if weight.op != "get_attr":
            return f"the weight is computed by %{weight.name}"
        kind, of = program.type_of(match.node("x")), program.type_of(weight)
        if not isinstance(kind, TensorType) or not isinstance(of, TensorType) or not of.dtype.is_floating_point:
            return "it is no product of floating tensors"
        if kind.dtype != of.dtype:
            return "the input and the weight differ in dtype"
        if match["bias"] is None:
            return None
        arguments = arguments_of(match.root)
        if arguments["beta"] != 1 or arguments["alpha"] != 1:
            return "addmm with factors other than 1"
        return bias_objection(program, match.node("bias"), of)

    def rewrite(self, rewriter: Rewriter, match: Match) -> fx.Node:
        return rewriter.call("aten.linear", match.node("x"), match.node("weight"), match["bias"], like=match.root)


class _Bias(Rule):
    """A bias added to a linear that has none."""

    name = "canonicalize-linears: bias"

    def match(self, program: Program, node: fx.Node) -> Match | tuple[int, str]:
        if op_name(node) != "aten.add.Tensor":
            return -1, ""
        first, second = arguments_of(node)["self"], arguments_of(node)["other"]
        for linear, bias in ((first, second), (second, first)):
            plain = isinstance(linear, fx.Node) and op_name(linear) == "aten.linear"
            if plain and arguments_of(linear)["bias"] is None and isinstance(bias, fx.Node) and bias.op == "get_attr":
                match = Match(program, node, {"linear": linear, "bias": bias})
                match.inner = [linear, node]
                return match
        return -1, ""

    def check(self, match: Match) -> str | None:
        program, linear = match.program, match.node("linear")
        if len(linear.users) > 1:
            return f"%{linear.name} is used without the bias too"
        if arguments_of(match.root)["alpha"] != 1:
            return "the sum has a factor"
        weight = program.type_of(arguments_of(linear)["weight"])
        if not isinstance(weight, TensorType) or program.type_of(match.root) != program.type_of(linear):
            return "the sum is of another shape or dtype"
        return bias_objection(program, match.node("bias"), weight)

    def rewrite(self, rewriter: Rewriter, match: Match) -> fx.Node:
        linear = match.node("linear")
        arguments = arguments_of(linear)
        # The module is the linear's: the sum often stands in the one around it.
        return rewriter.call("aten.linear", arguments["input"], arguments["weight"], match.node("bias"), like=linear)


def bias_objection(program: Program, bias: fx.Node, weight: TensorType) -> str | None:
    """Why a value added to a product is not the bias of a linear with a weight ``[out, in]``."""
    kind = program.type_of(bias)
    fits = isinstance(kind, TensorType) and kind.shape == weight.shape[:1] and kind.dtype == weight.dtype
    return None if fits else f"%{bias.name} is {kind}, a bias would be [{weight.shape[0]}] of the weight's dtype"
