"""Spelled-out layer normalisation into ``aten.layer_norm``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from graphwright.ir.arguments import argument
from graphwright.ir.pattern import Match, Matcher, Rule, any_, const, either, maybe, op
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
)
from graphwright.passes.fusion.spellings import divided_by_root, epsilon_reason, mean_of, root_of, squared, wrong_count

_TARGET = "aten.layer_norm"
_OTHER_MEANS = ("second mean", "third mean")


@dataclass(frozen=True, kw_only=True)
class FuseLayerNorm(RulePass):
    """Make one ``aten.layer_norm`` of a spelled-out layer norm.

    Before::

        %mean = aten.mean.dim(%x, [-1], True)
        %centred = aten.sub.Tensor(%x, %mean)
        %square = aten.pow.Tensor_Scalar(%centred, 2)
        %variance = aten.mean.dim(%square, [-1], True)
        %shifted = aten.add.Tensor(%variance, 1e-05)
        %root = aten.sqrt(%shifted)
        %normed = aten.div.Tensor(%centred, %root)
        %scaled = aten.mul.Tensor(%normed, %weight)
        %y = aten.add.Tensor(%scaled, %bias)

    After::

        %y = aten.layer_norm(%x, [384], %weight, %bias, 1e-05)

    The variance may be spelled as a mean of squares, ``var``, ``var_mean`` or the square of ``std``; weight and bias
    may be absent; casts to a wider dtype before and back after are taken in. Several trailing axes may be normalised
    together.

    Does not fire when

    - the mean or the variance does not run over the last axes, or the two run over different ones;
    - the normalised size varies from call to call;
    - the variance is unbiased (divided by n - 1);
    - epsilon stands outside the square root, or there is none;
    - a sum is not divided by the number of summed values;
    - an inner value, such as the variance, is used elsewhere too;
    - (weight, bias) the operand does not have exactly the normalised shape, or is of another dtype than the input.
    """

    name: ClassVar[str] = "fuse-layer-norm"
    near_miss: ClassVar[int] = 3

    def rules(self, program: Program) -> Sequence[Rule]:
        """The norm without weight and bias, the cast back, then weight and bias."""
        return [_Unscaled(), _CastBack(), _Weight(), _Bias(), _WeightAndBias()]


def _mean(x: Matcher, label: str) -> Matcher:
    joint = op("aten.var_mean.correction", x, const(f"{label}_dims", list, tuple), keepdim=True)
    return either(mean_of(x, label), op("py.getitem", joint, 1))


def _variance(x: Matcher, centred: Matcher) -> Matcher:
    dims, correction = const("variance_dims", list, tuple, int), const("correction", int, float, type(None))
    of = either(x, centred)
    deviation = either(
        op("aten.std.dim", of, dims, const("unbiased", bool), True),
        op("aten.std.correction", of, dims, correction=correction, keepdim=True),
    )
    joint = op("aten.var_mean.correction", of, dims, correction=correction, keepdim=True)
    return either(
        mean_of(squared(centred), "variance"),
        op("aten.var.dim", of, dims, const("unbiased", bool), True),
        op("aten.var.correction", of, dims, correction=correction, keepdim=True),
        op("py.getitem", joint, 0),
        squared(deviation),
    )


class _Unscaled(Rule):
    """``(x - mean) / √(variance + ε)``."""

    name = "layer-norm"

    def __init__(self) -> None:
        x = any_("x")
        centred = op("aten.sub.Tensor", x, _mean(x, "mean"), alpha=1)
        # x - mean may be written, and so computed, up to three times: below the root both factors of the square.
        others = [op("aten.sub.Tensor", x, _mean(x, label), alpha=1) for label in _OTHER_MEANS]
        again = either(centred, *others)
        variance = _variance(x, again)
        deviation = either(
            root_of(variance),
            op("aten.std.dim", x, const("variance_dims", list, tuple), const("unbiased", bool), True),
            op("aten.std.correction", x, const("variance_dims", list, tuple), keepdim=True),
        )
        self.pattern = [
            *divided_by_root(centred, op("aten.add.Tensor", variance, const("eps"), alpha=1)),
            op("aten.div.Tensor", centred, op("aten.add.Tensor", deviation, const("outside"))),
            op("aten.div.Tensor", centred, deviation),
        ]

    def check(self, match: Match) -> str | None:
        program, x = match.program, match.node("x")
        if "eps" not in match.bound:
            return epsilon_reason(match)
        sizes = trailing_sizes(program, x, match["variance_dims"])
        if isinstance(sizes, str):
            return sizes
        for label in ("mean", *_OTHER_MEANS):
            other = trailing_sizes(program, x, match.get(f"{label}_dims", match["variance_dims"]))
            if isinstance(other, str):
                return other
            if len(other) != len(sizes):
                return "the mean and the variance run over different axes"
        if match.get("unbiased") or match.get("correction", 0) != 0:
            return "the variance is unbiased (divided by n - 1), that of layer norm is divided by n"
        for node in match.inner:
            dtype = dtype_of(program, node)
            if dtype is not None and dtype != dtype_of(program, x):
                return f"%{node.name} is {dtype_name(dtype)}, the input {dtype_name(dtype_of(program, x))}"
        counts = (wrong_count(match, label, sizes) for label in ("mean", *_OTHER_MEANS, "variance"))
        return next(filter(None, counts), None) or leak(match)

    def rewrite(self, rewriter: Rewriter, match: Match) -> fx.Node:
        sizes = trailing_sizes(match.program, match.node("x"), match["variance_dims"])
        drop_assertions(rewriter, match)
        return rewriter.call(_TARGET, match.node("x"), list(sizes), None, None, float(match["eps"]), like=match.root)


def _norm(**fixed: Any) -> Matcher:
    """A layer norm; ``weight=None`` asks for one without weight."""
    return op(_TARGET, any_("x"), const("shape", list, tuple), eps=const("eps"), name="norm", **fixed)


class _CastBack(Rule):
    """The norm of a widened x, cast back to x's dtype: the operator widens by itself."""

    name = "layer-norm cast"
    pattern = op(CASTS, _norm())

    def check(self, match: Match) -> str | None:
        dtype, norm = dtype_of(match.program, match.root), match.node("norm")
        if dtype == dtype_of(match.program, norm):
            return None
        if dtype is None or as_dtype(match.program, match.node("x"), dtype) is None:
            return f"the norm is cast to {dtype_name(dtype)}, which its input was not"
        for label in ("weight", "bias"):
            vector = argument(norm, label)
            if vector is not None and as_dtype(match.program, vector, dtype) is None:
                return f"the {label} is {dtype_name(dtype_of(match.program, vector))}, the result {dtype_name(dtype)}"
        return leak(match)

    def rewrite(self, rewriter: Rewriter, match: Match) -> fx.Node:
        dtype, norm = dtype_of(match.program, match.root), match.node("norm")
        assert dtype is not None
        if dtype == dtype_of(match.program, norm):
            return norm  # the cast does nothing, but stands between the norm and its weight
        vectors = [argument(norm, label) for label in ("weight", "bias")]
        operands = [None if vector is None else as_dtype(match.program, vector, dtype) for vector in vectors]
        source = as_dtype(match.program, match.node("x"), dtype)
        drop_assertions(rewriter, match)
        return rewriter.call(_TARGET, source, match["shape"], *operands, match["eps"], like=match.root)


def _vector_reason(match: Match, label: str) -> str | None:
    norm, vector = tensor_type(match.program, match.node("norm")), tensor_type(match.program, match.node(label))
    reason = vector_reason(match, norm, vector, tuple(match["shape"]))
    if reason is None and norm is not None and vector is not None and vector.dtype != norm.dtype:
        reason = f"the {label} is {dtype_name(vector.dtype)}, the norm {dtype_name(norm.dtype)}"
    return reason


class _Weight(Rule):
    """The norm times a vector."""

    name = "layer-norm weight"
    pattern = op("aten.mul.Tensor", any_("weight"), maybe(CASTS, _norm(weight=None, bias=None)), commutative=True)

    def check(self, match: Match) -> str | None:
        return _vector_reason(match, "weight") or leak(match)

    def rewrite(self, rewriter: Rewriter, match: Match) -> fx.Node:
        drop_assertions(rewriter, match)
        return rewriter.call(
            _TARGET, match.node("x"), match["shape"], match.node("weight"), None, match["eps"], like=match.root
        )


class _Bias(Rule):
    """The norm plus a vector."""

    name = "layer-norm bias"
    pattern = op("aten.add.Tensor", any_("bias"), maybe(CASTS, _norm(bias=None)), commutative=True, alpha=1)

    def check(self, match: Match) -> str | None:
        return _vector_reason(match, "bias") or leak(match)

    def rewrite(self, rewriter: Rewriter, match: Match) -> fx.Node:
        weight = argument(match.node("norm"), "weight")
        drop_assertions(rewriter, match)
        return rewriter.call(
            _TARGET, match.node("x"), match["shape"], weight, match.node("bias"), match["eps"], like=match.root
        )


class _WeightAndBias(Rule):
    """``addcmul(bias, norm, weight)``."""

    name = "layer-norm weight and bias"
    pattern = either(
        op("aten.addcmul", any_("bias"), _norm(weight=None, bias=None), any_("weight"), value=1),
        op("aten.addcmul", any_("bias"), any_("weight"), _norm(weight=None, bias=None), value=1),
    )

    def check(self, match: Match) -> str | None:
        return _vector_reason(match, "weight") or _vector_reason(match, "bias") or leak(match)

    def rewrite(self, rewriter: Rewriter, match: Match) -> fx.Node:
        drop_assertions(rewriter, match)
        operands = match.node("weight"), match.node("bias")
        return rewriter.call(_TARGET, match.node("x"), match["shape"], *operands, match["eps"], like=match.root)
