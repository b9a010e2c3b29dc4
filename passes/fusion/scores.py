"""Reading a spelled-out attention backwards: from the product with the values, through softmax, to ``Q Kᵀ``."""

from __future__ import annotations

import math
from typing import Any

from torch import fx

from graphwright.ir.arguments import argument, arguments_of
from graphwright.ir.names import op_name
from graphwright.ir.program import Program
from graphwright.ir.types import fake_of, is_tensor
from graphwright.passes.cleanup.casts import CASTS
from graphwright.passes.cleanup.effects import is_idle_dropout
from graphwright.passes.fusion.heads import Heads, constant_of, scaled
from graphwright.passes.fusion.masks import SCORES, Term
from graphwright.passes.fusion.matching import tensor_type
from graphwright.passes.fusion.products import query_and_key, transposed_key

_SOFTMAX = frozenset({"aten.softmax.int", "aten._softmax", "aten._safe_softmax"})
_KEEPS = frozenset({"aten.clone", "aten.contiguous", "aten.alias", "aten.detach", *CASTS})
_RESHAPES = frozenset({"aten.view", "aten.reshape", "aten._unsafe_view", "aten.expand"})
_DROPOUTS = frozenset({"aten.dropout", "aten.native_dropout", "aten.feature_dropout"})

# Axes of scores by their number: of three, the first may be batch and head in one.
_FLAT = (None, *SCORES[2:])


class Scores:
    """What stands between the product of queries and keys and the product with the values.

    Args:
        program: only read.
        never: scores filled in at or below this are taken for "never attended".

    Attributes:
        query: of the scores.
        key: of the scores.
        scale: factor on the scores.
        terms: masks and what is added.
        inner: the operators that were read.
        is_reshaped: whether the scores change between ``[B, H, S, T]`` and ``[B * H, S, T]`` on the way.
        miss: how deep reading got before it failed, and why.
    """

    def __init__(self, program: Program, never: float) -> None:
        self.program = program
        self.query: Heads | None = None
        self.key: Heads | None = None
        self.scale = 1.0
        self.terms: list[Term] = []
        self.inner: list[fx.Node] = []
        self.is_reshaped = False
        self.miss = (-1, "")
        self._never = never
        self._is_safe = False  # whether rows of -inf give zeros

    def read(self, weights: Any) -> bool:
        """Read from the attention weights backwards."""
        node = weights
        while isinstance(node, fx.Node) and op_name(node) not in _SOFTMAX:
            if op_name(node) == "aten.nan_to_num" and argument(node, "nan") in (None, 0.0):
                self._is_safe = True
            elif not self._passes(node):
                return self._is_below_softmax(node) and self._fail(node, _between(node))
            self.inner.append(node)
            node = node.args[0]
        if not isinstance(node, fx.Node):
            return False
        self.inner.append(node)
        scores, dim = argument(node, "self"), argument(node, "dim")
        rank = fake_of(node).dim()
        if dim % rank != rank - 1:
            return self._fail(node, f"= softmax runs over axis {dim}, not over the keys")
        self._is_safe |= op_name(node) == "aten._safe_softmax"
        return self._descend(scores, 1.0)

    def _is_below_softmax(self, node: fx.Node) -> bool:
        for _ in range(4):
            source = node.args[0] if node.args else None
            if not isinstance(source, fx.Node) or op_name(source) in _SOFTMAX:
                return isinstance(source, fx.Node)
            node = source
        return False

    def _fail(self, node: fx.Node, reason: str) -> bool:
        depth = len(self.inner) + 2
        if depth > self.miss[0]:
            self.miss = (depth, f"%{node.name} {reason}")
        return False

    def _passes(self, node: fx.Node) -> bool:
        """Whether a node hands on its operand, as it is or in another shape; notes a change between 3 and 4 axes."""
        name = op_name(node)
        if name in _KEEPS or is_idle_dropout(node):
            return True
        source = node.args[0] if name in _RESHAPES else None
        if not isinstance(source, fx.Node):
            return False
        before, after = tensor_type(self.program, source), tensor_type(self.program, node)
        if before == after:
            return True
        if name == "aten.expand" or before is None or after is None or before.shape[-2:] != after.shape[-2:]:
            return False
        if {len(before.shape), len(after.shape)} != {3, 4}:
            return False
        self.is_reshaped = True
        return True

    # -- the scores ------------------------------------------------------------------------------------------------

    def _descend(self, node: Any, factor: float) -> bool:
        """Read the scores from softmax down to the product; what is found below is multiplied by ``factor``."""
        if not isinstance(node, fx.Node) or not is_tensor(node):
            return False
        self.inner.append(node)
        if self._step(node, factor):
            return True
        self.inner.remove(node)
        return False

    def _step(self, node: fx.Node, factor: float) -> bool:
        name = op_name(node)
        factors = query_and_key(self.program, node)
        if factors is not None:
            return self._product(factors, factor)
        if name == "aten.baddbmm":
            return self._added_product(node, factor)
        times = scaled(self.program, node)
        if times is not None:
            return self._descend(times[0], factor * times[1])
        if name in ("aten.add.Tensor", "aten.sub.Tensor"):
            return self._sum(node, factor)
        if name.startswith(("aten.where.", "aten.masked_fill.")):
            return self._mask(node, factor)
        if name in ("aten.mul.Tensor", "aten.div.Tensor"):
            return self._fail(node, "scales the scores by a value that is computed or trained")
        if self._passes(node):
            return self._descend(node.args[0], factor)
        return self._fail(node, f"= {name} stands between the scores and softmax")

    def _product(self, factors: tuple[Heads, Heads], factor: float) -> bool:
        (self.query, self.key), self.scale = factors, factor
        return True

    def _added_product(self, node: fx.Node, factor: float) -> bool:
        arguments = arguments_of(node)
        alpha, beta = arguments["alpha"], arguments["beta"]
        if not isinstance(alpha, int | float) or not isinstance(beta, int | float):
            return self._fail(node, "scales the scores by a value that is computed")
        if beta:
            self._add(arguments["self"], node, factor * beta)
        query, key = arguments["batch1"], arguments["batch2"]
        return self._product((Heads(query), transposed_key(self.program, key)), factor * alpha)

    def _sum(self, node: fx.Node, factor: float) -> bool:
        alpha = argument(node, "alpha")
        if not isinstance(alpha, int | float):
            return self._fail(node, "adds a multiple that is computed")
        left, right = node.args[0], node.args[1]
        sign = alpha if op_name(node) == "aten.add.Tensor" else -alpha
        for scores, other, first, second in ((left, right, 1.0, sign), (right, left, sign, 1.0)):
            terms, reshaped = list(self.terms), self.is_reshaped
            if isinstance(other, fx.Node) and is_tensor(other) and self._is_like(scores, node):
                self._add(other, node, factor * second)
                if self._descend(scores, factor * first):
                    return True
            self.terms, self.is_reshaped = terms, reshaped
        return False

    def _mask(self, node: fx.Node, factor: float) -> bool:
        arguments = arguments_of(node)
        if op_name(node).startswith("aten.masked_fill."):
            kind, condition = "drop", arguments["mask"]
            choices = [(kind, arguments["self"], arguments["value"])]
        else:
            condition = arguments["condition"]
            choices = [
                ("keep", arguments["self"], arguments["other"]),
                ("drop", arguments["other"], arguments["self"]),
            ]
        for kind, scores, value in choices:
            fill = constant_of(self.program, value)
            if fill is None or not self._is_like(scores, node):
                continue
            if fill * factor > self._never:
                return self._fail(node, f"fills scores with {fill:g}, which does not rule them out")
            terms, reshaped = list(self.terms), self.is_reshaped
            is_safe = self._is_safe and math.isinf(fill)
            self.terms.append(Term(kind, condition, _axes(node), fill=fill * factor, is_safe=is_safe))
            if self._descend(scores, factor):
                return True
            self.terms, self.is_reshaped = terms, reshaped
        return False

    def _is_like(self, scores: Any, node: fx.Node) -> bool:
        """Whether an operand has the shape of the result, as scores have."""
        found, wanted = tensor_type(self.program, scores), tensor_type(self.program, node)
        return found is not None and wanted is not None and found.shape == wanted.shape

    def _add(self, term: fx.Node, node: fx.Node, factor: float) -> None:
        self.terms.append(Term("add", term, _axes(node), factor, is_safe=self._is_safe))


def _axes(scores: fx.Node) -> tuple[str | None, ...]:
    return SCORES if fake_of(scores).dim() == 4 else _FLAT


def _between(node: fx.Node) -> str:
    if op_name(node) in _DROPOUTS:
        return "drops attention weights at random"
    return f"= {op_name(node)} stands between softmax and the values"
