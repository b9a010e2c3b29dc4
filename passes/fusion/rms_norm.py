"""Spelled-out root-mean-square normalisation into one operator.

Three small rules, each a valid rewrite of its own, cover every spelling: the unscaled norm, its cast back to the
input's dtype, and the multiplication by the weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from graphwright.ir.arguments import argument
from graphwright.ir.pattern import Match, Rule, any_, const, maybe, op
from graphwright.ir.program import Program
from graphwright.ir.rewriter import Rewriter
from graphwright.passes.base import RulePass
from graphwright.passes.fusion.matching import (
    CASTS,
    as_dtype,
    drop_assertions,
    dtype_name,
    dtype_of,
    leak,
    tensor_type,
    trailing_sizes,
    vector_reason,
    without_casts,
)
from graphwright.passes.fusion.spellings import divided_by_root, epsilon_reason, mean_of, root_of, squared, wrong_count

_TARGET = "graphwright.rms_norm"


@dataclass(frozen=True, kw_only=True)
class FuseRMSNorm(RulePass):
    """Make one ``graphwright.rms_norm`` of a spelled-out root-mean-square norm, or of ``aten.rms_norm``.

    Before (Llama)::

        %square = aten.pow.Tensor_Scalar(%x, 2)
        %mean = aten.mean.dim(%square, [-1], True)
        %shifted = aten.add.Tensor(%mean, 1e-06)
        %scale = aten.rsqrt(%shifted)
        %normed = aten.mul.Tensor(%x, %scale)
        %y = aten.mul.Tensor(%weight, %normed)

    After::

        %y = graphwright.rms_norm(%x, %weight, 1e-06)

    Casts to a wider dtype before and back after are taken in. ``1 + weight`` (Gemma) stays a small node of its own
    that feeds the operator. A weight is any vector as long as the last dimension, trainable or computed. In 16-bit
    dtypes the result is rounded once instead of twice.

    Does not fire when

    - the mean does not run over the last axis, or runs over several;
    - epsilon stands outside the square root, or there is none;
    - the sum is not divided by the number of summed values;
    - a cast on the way narrows the dtype, so that the spelled-out form rounds where the operator would not;
    - an inner value, such as the mean, is used elsewhere too;
    - (weight) the factor is not a vector as long as the last dimension, or widens the result's dtype.
    """

    name: ClassVar[str] = "fuse-rms-norm"
    near_miss: ClassVar[int] = 3

    def rules(self, program: Program) -> Sequence[Rule]:
        """The unscaled norm, torch's own operator, the cast back, the weight."""
        return [_Unscaled(), _Aten(), _CastBack(), _Weight()]


class _Unscaled(Rule):
    """``x / √(mean(x²) + ε)``."""

    name = "rms-norm"

    def __init__(self) -> None:
        # Squares may be taken of a cast of x, so the two are bound apart and compared in check().
        x, mean = any_("x"), mean_of(squared(any_("squared")), "mean")
        self.pattern = [
            *divided_by_root(x, op("aten.add.Tensor", mean, const("eps"), alpha=1)),
            op("aten.div.Tensor", x, op("aten.add.Tensor", root_of(mean), const("outside"))),
            *divided_by_root(x, mean),
        ]

    def check(self, match: Match) -> str | None:
        program, x, squares = match.program, match.node("x"), match.node("squared")
        if without_casts(program, x) is not without_casts(program, squares):
            return f"%{squares.name} is squared, but %{x.name} is normalised"
        sizes = trailing_sizes(program, squares, match["mean_dims"])
        if isinstance(sizes, str):
            return sizes
        if len(sizes) != 1:
            return f"the mean runs over the last {len(sizes)} axes; the operator normalises the last one"
        return epsilon_reason(match) or wrong_count(match, "mean", sizes) or _narrowing(match, squares) or leak(match)

    def rewrite(self, rewriter: Rewriter, match: Match) -> fx.Node:
        source = _source(match)
        assert source is not None
        drop_assertions(rewriter, match)
        return rewriter.call(_TARGET, source, None, float(match["eps"]), like=match.root)


def _source(match: Match) -> fx.Node | None:
    """The operand of the result's dtype: x, or the cast of it that was squared."""
    dtype = dtype_of(match.program, match.root)
    if dtype is None:
        return None
    return as_dtype(match.program, match.node("x"), dtype) or as_dtype(match.program, match.node("squared"), dtype)


def _narrowing(match: Match, squares: fx.Node) -> str | None:
    wanted = dtype_of(match.program, squares)
    for node in match.inner:
        dtype = dtype_of(match.program, node)
        if node is not match.root and dtype != wanted:
            return f"%{node.name} is {dtype_name(dtype)}, but {dtype_name(wanted)} was squared"
    if _source(match) is None:
        return f"the result is {dtype_name(dtype_of(match.program, match.root))}, which no operand is"
    return None


class _Aten(Rule):
    """``aten.rms_norm`` over the last dimension."""

    name = "rms-norm"
    pattern = op("aten.rms_norm", any_("x"), const("shape", list, tuple))

    def check(self, match: Match) -> str | None:
        kind = tensor_type(match.program, match.node("x"))
        if len(match["shape"]) != 1:
            return f"it normalises the last {len(match['shape'])} axes together"
        weight = argument(match.root, "weight")
        if weight is not None and dtype_of(match.program, weight) != (kind.dtype if kind else None):
            return f"the weight is {dtype_name(dtype_of(match.program, weight))}, the input {kind}"
        return None

    def rewrite(self, rewriter: Rewriter, match: Match) -> fx.Node:
        x, eps = match.node("x"), argument(match.root, "eps")
        if eps is None:
            # torch's default: the machine epsilon of the dtype it computes in
            dtype = dtype_of(match.program, x)
            assert dtype is not None
            eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
        return rewriter.call(_TARGET, x, argument(match.root, "weight"), float(eps), like=match.root)


class _CastBack(Rule):
    """The norm of a widened x, cast back to x's dtype: the operator widens by itself."""

    name = "rms-norm cast"
    pattern = op(CASTS, op(_TARGET, any_("wide"), name="norm"))

    def check(self, match: Match) -> str | None:
        dtype = dtype_of(match.program, match.root)
        if dtype == dtype_of(match.program, match.node("norm")):
            return None
        if dtype is None or as_dtype(match.program, match.node("wide"), dtype) is None:
            return f"the norm is cast to {dtype_name(dtype)}, which its input was not"
        return leak(match)

    def rewrite(self, rewriter: Rewriter, match: Match) -> fx.Node:
        dtype, norm = dtype_of(match.program, match.root), match.node("norm")
        assert dtype is not None
        if dtype == dtype_of(match.program, norm):
            return norm  # the cast does nothing, but stands between the norm and its weight
        source = as_dtype(match.program, match.node("wide"), dtype)
        drop_assertions(rewriter, match)
        return rewriter.call(_TARGET, source, argument(norm, "weight"), argument(norm, "eps"), like=match.root)


class _Weight(Rule):
    """The unscaled norm times a vector."""

    name = "rms-norm weight"
    pattern = op(
        "aten.mul.Tensor",
        any_("weight"),
        maybe(CASTS, op(_TARGET, any_("x"), None, const("eps"), name="norm")),
        commutative=True,
    )

    def check(self, match: Match) -> str | None:
        kind, weight = tensor_type(match.program, match.node("norm")), tensor_type(match.program, match.node("weight"))
        return vector_reason(match, kind, weight, kind.shape[-1:] if kind else ()) or leak(match)

    def rewrite(self, rewriter: Rewriter, match: Match) -> fx.Node:
        drop_assertions(rewriter, match)
        return rewriter.call(_TARGET, match.node("x"), match.node("weight"), match["eps"], like=match.root)
