"""The middle of a gated feed-forward block into one operator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from graphwright.ir.names import op_name
from graphwright.ir.pattern import Match, Matcher, Rule, any_, op
from graphwright.ir.program import Program
from graphwright.ir.rewriter import Rewriter
from graphwright.passes.base import RulePass
from graphwright.passes.fusion.matching import drop_assertions, leak, tensor_type

_OTHERS = tuple(f"aten.{name}" for name in ("sigmoid", "tanh", "leaky_relu", "elu", "mish", "hardswish", "softplus"))


@dataclass(frozen=True, kw_only=True)
class FuseGatedActivation(RulePass):
    """Make one ``graphwright.gated_activation`` of an activation times another value (Shazeer 2020, GLU variants).

    Before::

        %silu = aten.silu(%gate)
        %y = aten.mul.Tensor(%silu, %up)

    After::

        %y = graphwright.gated_activation(%gate, %up, 'silu')

    The activation is SiLU (also spelled ``gate·sigmoid(gate)``), GELU (exact or tanh) or ReLU. Gate and up may come
    from two linears or from one that was split.

    Does not fire when

    - gate and up differ in dtype or shape, so that one is broadcast;
    - the activation's result is used elsewhere too, or multiplied by itself;
    - the activation is another one, a plain sigmoid included.
    """

    name: ClassVar[str] = "fuse-gated-activation"
    after: ClassVar[tuple[str, ...]] = ("fuse-gelu",)
    near_miss: ClassVar[int] = 2

    def rules(self, program: Program) -> Sequence[Rule]:
        """One rule per activation, and one that only says why it does not apply."""
        gate = any_("gate")
        return [
            _Gated("silu", op("aten.silu", gate)),
            _Gated("silu", op("aten.mul.Tensor", gate, op("aten.sigmoid", gate), commutative=True)),
            _Gated("gelu", op("aten.gelu", gate, approximate="none")),
            _Gated("gelu_tanh", op("aten.gelu", gate, approximate="tanh")),
            _Gated("relu", op("aten.relu", gate)),
            _OtherActivation(),
        ]


class _Gated(Rule):
    """``activation(gate) · up``."""

    def __init__(self, activation: str, pattern: Matcher) -> None:
        self.name = f"gated {activation}"
        self.activation = activation
        self.pattern = op("aten.mul.Tensor", pattern, any_("up"), commutative=True)

    def check(self, match: Match) -> str | None:
        gate, up = (tensor_type(match.program, match.node(name)) for name in ("gate", "up"))
        if gate is None or gate != up:
            return f"the gate is {gate}, the other factor {up}"
        if match.node("up") in match.inner:
            return "the activation is multiplied by itself"
        return leak(match)

    def rewrite(self, rewriter: Rewriter, match: Match) -> fx.Node:
        drop_assertions(rewriter, match)
        operands = match.node("gate"), match.node("up"), self.activation
        return rewriter.call("graphwright.gated_activation", *operands, like=match.root)


class _OtherActivation(Rule):
    """Never rewrites; tells of products with an activation the operator does not have."""

    name = "gated activation"
    pattern = op("aten.mul.Tensor", op(_OTHERS, any_("gate"), name="activation"), any_("up"), commutative=True)

    def match(self, program: Program, node: fx.Node) -> Match | tuple[int, str]:
        found = super().match(program, node)
        if isinstance(found, Match) and found.node("up") is found.node("gate"):
            return -1, ""  # an activation in itself, such as x·sigmoid(x)
        return found

    def check(self, match: Match) -> str | None:
        return f"{op_name(match.node('activation'))} is none of the operator's activations"

    def rewrite(self, rewriter: Rewriter, match: Match) -> fx.Node | None:
        return None
