"""Write your own pass: pattern, check, rewrite. The pipeline holds it to its contract, whoever wrote it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

import graphwright as gw


class DivisionByPowerOfTwo(gw.Rule):
    """``x / 8`` is ``x * 0.125``, bit for bit."""

    pattern = gw.op("aten.div.Tensor", gw.any_("x"), gw.const("divisor"))

    def check(self, match: gw.Match) -> str | None:
        exact = math.frexp(match["divisor"])[0] == 0.5
        return None if exact else f"{match['divisor']} is no power of two, so its reciprocal would be rounded"

    def rewrite(self, rewriter: gw.Rewriter, match: gw.Match) -> torch.fx.Node | None:
        return rewriter.call("aten.mul.Tensor", match["x"], 1 / match["divisor"], like=match.root)


@dataclass(frozen=True, kw_only=True)
class MultiplyInsteadOfDivide(gw.RulePass):
    """Write divisions by powers of two as multiplications, which are faster and just as exact."""

    name: ClassVar[str] = "multiply-instead-of-divide"
    contract: ClassVar[gw.Exact] = gw.Exact(bitwise=True)
    near_miss: ClassVar[int] = 1

    def rules(self, program: gw.Program) -> Sequence[gw.Rule]:
        return [DivisionByPowerOfTwo()]


class Scale(torch.nn.Module):
    """A model with one division to rewrite and one to leave alone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(x / 8, dim=-1) / 3


class WrongDivision(DivisionByPowerOfTwo):
    """The same with a slip of the pen."""

    def rewrite(self, rewriter: gw.Rewriter, match: gw.Match) -> torch.fx.Node | None:
        return rewriter.call("aten.mul.Tensor", match["x"], 2 / match["divisor"], like=match.root)


@dataclass(frozen=True, kw_only=True)
class MultiplyWrongly(MultiplyInsteadOfDivide):
    """Caught the moment it has run."""

    name: ClassVar[str] = "multiply-wrongly"

    def rules(self, program: gw.Program) -> Sequence[gw.Rule]:
        return [WrongDivision()]


def main() -> None:
    """Run the pass, ask it why it left a place alone, and see a wrong one caught."""
    x = torch.randn(2, 4)
    program = gw.trace(Scale(), x)
    print(gw.optimize(program, [MultiplyInsteadOfDivide()], example_inputs=x))
    for refusal in MultiplyInsteadOfDivide().refusals(program):
        print(f"left alone: {refusal}")
    try:
        gw.optimize(program, [MultiplyWrongly()], example_inputs=x)
    except gw.ContractViolation as error:
        print(f"caught: {error}")


if __name__ == "__main__":
    main()
