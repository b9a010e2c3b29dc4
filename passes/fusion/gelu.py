"""Spelled-out GELU into ``aten.gelu``, exact and tanh-approximated."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from graphwright.ir.names import op_name
from graphwright.ir.pattern import Match, Rule
from graphwright.ir.program import Program
from graphwright.ir.rewriter import Rewriter
from graphwright.passes.base import RulePass
from graphwright.passes.contract import Exact
from graphwright.passes.fusion.matching import drop_assertions, leak, tensor_type
from graphwright.passes.fusion.polynomial import Expander, Polynomial, is_close

# Constants may have been rounded to float32, which moves them by up to 6e-8.
_CONSTANT_TOLERANCE = 1e-7

_ARITHMETIC = (
    "aten.mul.Tensor",
    "aten.div.Tensor",
    "aten.add.Tensor",
    "aten.sub.Tensor",
    "aten.rsub.Scalar",
    "aten.neg",
    "aten.pow.Tensor_Scalar",
    "aten.square",
)
_FUNCTIONS = ("aten.erf", "aten.tanh", "aten.sigmoid")
_DEEPEST = 6

_SQRT_2_OVER_PI = math.sqrt(2.0 / math.pi)
_ARGUMENTS: dict[str, Polynomial] = {
    "aten.erf": {(1,): math.sqrt(0.5)},
    "aten.tanh": {(1,): _SQRT_2_OVER_PI, (3,): _SQRT_2_OVER_PI * 0.044715},
}
_WRITTEN = {"aten.erf": "x/√2", "aten.tanh": "√(2/π)·(x + 0.044715·x³)"}
# 0.5·x + 0.5·x·f, in (x, f)
_OUTSIDE: Polynomial = {(1, 0): 0.5, (1, 1): 0.5}


@dataclass(frozen=True, kw_only=True)
class FuseGelu(RulePass):
    """Make one ``aten.gelu`` of a spelled-out GELU (Hendrycks & Gimpel 2016), by ``erf`` or in the tanh approximation.

    Before (exact)::

        %half = aten.mul.Tensor(%x, 0.5)
        %scaled = aten.div.Tensor(%x, 1.4142135623730951)
        %erf = aten.erf(%scaled)
        %shifted = aten.add.Tensor(%erf, 1.0)
        %y = aten.mul.Tensor(%half, %shifted)

    After::

        %y = aten.gelu(%x)

    ``0.5·x·(1 + tanh(√(2/π)·(x + 0.044715·x³)))`` becomes ``aten.gelu(%x, approximate='tanh')``. Both are recognised
    in every order of their factors and summands, with powers spelled as ``pow`` or products. Constants may be rounded
    to float32.

    Does not fire when

    - the function is a sigmoid: quick GELU, ``x·sigmoid(1.702·x)``, is another function;
    - a constant differs, such as 0.5, √2, √(2/π) or 0.044715;
    - erf or tanh is taken of another value than the one it multiplies;
    - an inner value, such as the erf, is used elsewhere too.
    """

    name: ClassVar[str] = "fuse-gelu"
    # Constants rounded to float32 shift the function by as much.
    contract: ClassVar[Exact] = Exact(tolerance=1e-6)

    def rules(self, program: Program) -> Sequence[Rule]:
        """One rule for both spellings."""
        return [_Gelu()]


class _Gelu(Rule):
    """``0.5·x·(1 + f(p(x)))``, compared as polynomials in x and f."""

    name = "gelu"

    def match(self, program: Program, node: fx.Node) -> Match | tuple[int, str]:
        best = (-1, "")
        if op_name(node) not in _ARITHMETIC:
            return best
        for function in _functions_below(node):
            for x in _operands_below(function):
                found = _try(program, node, function, x)
                if isinstance(found, Match):
                    return found
                best = max(best, found)
        return (-1, "") if _is_scaled_on(node) else best

    def check(self, match: Match) -> str | None:
        x, root = tensor_type(match.program, match.node("x")), tensor_type(match.program, match.root)
        if x is None or x != root or not x.dtype.is_floating_point:
            return f"the operand is {x}, the result {root}"
        return leak(match)

    def rewrite(self, rewriter: Rewriter, match: Match) -> fx.Node:
        drop_assertions(rewriter, match)
        approximate = "tanh" if match["function"] == "aten.tanh" else "none"
        return rewriter.call("aten.gelu", match.node("x"), approximate=approximate, like=match.root)


def _try(program: Program, root: fx.Node, function: fx.Node, x: fx.Node) -> Match | tuple[int, str]:
    name = op_name(function)
    outside, inside = Expander([x, function]), Expander([x])
    outer, inner = outside.expand(root), inside.expand(function.args[0])
    if outer is None or inner is None:
        return -1, ""
    if name == "aten.sigmoid":
        if outer.keys() == {(1, 1)} and inner.keys() == {(1,)} and inner[1,] != 1.0:
            return 3, f"x·sigmoid({inner[1,]:g}·x) is quick GELU, another function"
        return -1, ""
    if not outer.keys() >= {(1, 1)} or (1,) not in inner:
        return -1, ""
    if not is_close(inner, _ARGUMENTS[name], _CONSTANT_TOLERANCE):
        return len(inside.inner) + 2, f"{name} is taken of {_as_text(inner)}, not of {_WRITTEN[name]}"
    if not is_close(outer, _OUTSIDE, _CONSTANT_TOLERANCE):
        return len(inside.inner) + 3, f"the result is {_as_text(outer, name)}, not {_as_text(_OUTSIDE, name)}"
    match = Match(program, root, {"x": x, "function": name})
    match.inner = list(dict.fromkeys([*inside.inner, function, *outside.inner]))
    return match


def _is_scaled_on(node: fx.Node) -> bool:
    """Whether the one use of a value is a product with a number, where the expression may turn out to be whole."""
    users = list(node.users)
    return (
        len(users) == 1
        and op_name(users[0]) in ("aten.mul.Tensor", "aten.div.Tensor")
        and isinstance(users[0].args[1], int | float)
    )


def _functions_below(root: fx.Node) -> Iterator[fx.Node]:
    for node in _expression(root):
        if op_name(node) in _FUNCTIONS:
            yield node


def _operands_below(function: fx.Node) -> Iterator[fx.Node]:
    for node in function.all_input_nodes:
        yield from _expression(node)


def _expression(root: fx.Node) -> Iterator[fx.Node]:
    """The nodes of an arithmetic expression, its leaves included, nearest first."""
    level, seen = [root], {root}
    for _ in range(_DEEPEST):
        yield from level
        operands = (item for node in level if op_name(node) in _ARITHMETIC for item in node.all_input_nodes)
        level = [item for item in dict.fromkeys(operands) if item not in seen]
        seen.update(level)


def _as_text(polynomial: Polynomial, function: str = "") -> str:
    names = ("x", f"{function.removeprefix('aten.')}(…)")
    terms = []
    for powers, coefficient in sorted(polynomial.items()):
        factors = [
            name if power == 1 else f"{name}^{power}" for name, power in zip(names, powers, strict=False) if power
        ]
        terms.append("·".join([f"{coefficient:.7g}", *factors]))
    return " + ".join(terms)
