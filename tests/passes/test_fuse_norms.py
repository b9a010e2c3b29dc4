"""Layer norm and RMS norm: every spelling becomes one operator, and near misses do not."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import graphwright as gw
from graphwright.ir.arguments import arguments_of
from graphwright.ir.provenance import add_tags
from graphwright.passes.fusion import FuseLayerNorm, FuseRMSNorm

Spelling = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Any]
Listing = Callable[[gw.Program], list[str]]
WIDTH = 8


class Spelled(nn.Module):
    """A function of x, a weight and a bias."""

    def __init__(self, spelling: Spelling, width: int = WIDTH) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)
        self.bias = nn.Parameter(torch.randn(width))
        self.spelling = spelling

    def forward(self, x: torch.Tensor) -> Any:
        return self.spelling(x, self.weight, self.bias)


def traced(spelling: Spelling, dtype: torch.dtype = torch.float32) -> tuple[gw.Program, torch.Tensor]:
    """The program of a spelling, and an input whose mean is far from zero."""
    x = (torch.randn(2, 5, WIDTH) * 2 + 1).to(dtype)
    return gw.trace(Spelled(spelling).to(dtype), x), x


def operators(program: gw.Program) -> list[str]:
    return [gw.op_name(node) for node in program.nodes if node.op == "call_function"]


def assert_equivalent(before: gw.Program, after: gw.Program, x: torch.Tensor) -> None:
    """Equal to rounding: in float64 to 1e-12, otherwise to a few steps of the dtype."""
    for rows in (x, x[:1], torch.cat([x, x * 1e-3, torch.zeros_like(x)])):
        expected, found = before(rows), after(rows)
        assert found.dtype == expected.dtype
        step = torch.finfo(x.dtype).eps
        tolerance = 1e-12 if x.dtype == torch.float64 else 16 * step
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * 4)


def refusals(item: gw.Pass, program: gw.Program) -> str:
    return "\n".join(map(str, item.refusals(program)))


# -- RMS norm ----------------------------------------------------------------------------------------------------------


def mean_square(x: torch.Tensor) -> torch.Tensor:
    return x.pow(2).mean(-1, keepdim=True)


RMS_WITH_WEIGHT: dict[str, Spelling] = {
    "llama": lambda x, w, b: w * (x * torch.rsqrt(mean_square(x) + 1e-5)),
    "weight on the right": lambda x, w, b: torch.rsqrt(mean_square(x) + 1e-5) * x * w,
    "product": lambda x, w, b: w * (x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-5)),
    "square": lambda x, w, b: w * (x * torch.rsqrt(torch.square(x).mean(dim=2, keepdim=True) + 1e-5)),
    "division": lambda x, w, b: w * (x / torch.sqrt(mean_square(x) + 1e-5)),
    "power of a half": lambda x, w, b: w * (x / (mean_square(x) + 1e-5) ** 0.5),
    "negative power": lambda x, w, b: w * (x * torch.pow(mean_square(x) + 1e-5, -0.5)),
    "reciprocal": lambda x, w, b: w * (x * torch.reciprocal(torch.sqrt(mean_square(x) + 1e-5))),
    "sum": lambda x, w, b: w * (x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) / WIDTH + 1e-5)),
    "share": lambda x, w, b: w * (x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) * (1 / WIDTH) + 1e-5)),
    "torch": lambda x, w, b: functional.rms_norm(x, (WIDTH,), w, 1e-5),
    "torch, default epsilon": lambda x, w, b: functional.rms_norm(x, (WIDTH,), w),
    "gemma": lambda x, w, b: x * torch.rsqrt(mean_square(x) + 1e-5) * (1.0 + w),
}
RMS_PLAIN: dict[str, Spelling] = {
    "no weight": lambda x, w, b: x * torch.rsqrt(mean_square(x) + 1e-5),
    "torch": lambda x, w, b: functional.rms_norm(x, (WIDTH,), None, 1e-5),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", RMS_WITH_WEIGHT)
def test_rms_norm_with_weight(name: str, dtype: torch.dtype) -> None:
    program, x = traced(RMS_WITH_WEIGHT[name], dtype)
    before = program.clone()
    assert FuseRMSNorm()(program)
    expected = ["aten.add.Tensor", "graphwright.rms_norm"] if name == "gemma" else ["graphwright.rms_norm"]
    assert operators(program) == expected
    (norm,) = [node for node in program.nodes if gw.op_name(node) == "graphwright.rms_norm"]
    assert norm.args[1] is not None
    assert_equivalent(before, program, x)
    assert not FuseRMSNorm()(program)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", RMS_PLAIN)
def test_rms_norm_without_weight(name: str, dtype: torch.dtype) -> None:
    program, x = traced(RMS_PLAIN[name], dtype)
    before = program.clone()
    assert FuseRMSNorm()(program)
    assert operators(program) == ["graphwright.rms_norm"]
    assert_equivalent(before, program, x)


def test_rms_norm_text(listing: Listing) -> None:
    program, _ = traced(RMS_WITH_WEIGHT["llama"])
    assert listing(program) == [
        "%pow_1 = aten.pow.Tensor_Scalar(%x, 2)",
        "%mean = aten.mean.dim(%pow_1, [-1], True)",
        "%add = aten.add.Tensor(%mean, 1e-05)",
        "%rsqrt = aten.rsqrt(%add)",
        "%mul = aten.mul.Tensor(%x, %rsqrt)",
        "%mul_1 = aten.mul.Tensor(%weight, %mul)",
    ]
    FuseRMSNorm()(program)
    (line,) = listing(program)
    assert line.endswith("= graphwright.rms_norm(%x, %weight, 1e-05)")


def cast_inside(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    wide = x.to(torch.float32)
    return w * (wide * torch.rsqrt(mean_square(wide) + 1e-5)).to(x.dtype)


def cast_outside(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    return (w.float() * (wide * torch.rsqrt(mean_square(wide) + 1e-5))).type_as(x)


def cast_of_the_variance(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """As T5 has it: only the mean is computed in float32, the product is promoted."""
    return w * (x * torch.rsqrt(mean_square(x.to(torch.float32)) + 1e-5)).to(w.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("spelling", [cast_inside, cast_outside, cast_of_the_variance], ids=lambda item: item.__name__)
def test_rms_norm_takes_in_casts(spelling: Spelling, dtype: torch.dtype) -> None:
    program, x = traced(spelling, dtype)
    before = program.clone()
    assert FuseRMSNorm()(program)
    (norm,) = [node for node in program.nodes if gw.op_name(node) == "graphwright.rms_norm"]
    assert norm.args[0].op == "placeholder"
    assert norm.args[1] is not None
    gw.RemoveDeadCode()(program)
    assert set(operators(program)) <= {"graphwright.rms_norm", "aten.to.dtype"}
    assert_equivalent(before, program, x)


def test_rms_norm_keeps_the_wide_result() -> None:
    """No cast back: the operator reads the widened x and gives its dtype."""
    program, x = traced(lambda x, w, b: x.float() * torch.rsqrt(mean_square(x.float()) + 1e-5), torch.bfloat16)
    gw.EliminateCommonSubexpressions()(program)
    before = program.clone()
    assert FuseRMSNorm()(program)
    gw.RemoveDeadCode()(program)
    assert operators(program) == ["aten.to.dtype", "graphwright.rms_norm"]
    assert_equivalent(before, program, x)


RMS_REFUSED: dict[str, tuple[Spelling, str]] = {
    "first axis": (lambda x, w, b: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-5), "not over the last"),
    "two axes": (lambda x, w, b: x * torch.rsqrt(x.pow(2).mean((1, 2), keepdim=True) + 1e-5), "varies"),
    "epsilon outside": (lambda x, w, b: x / (torch.sqrt(mean_square(x)) + 1e-5), "not under it"),
    "no epsilon": (lambda x, w, b: x * torch.rsqrt(mean_square(x)), "no epsilon"),
    "wrong count": (
        lambda x, w, b: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) / (WIDTH - 1) + 1e-5),
        "the sum over 8 values is divided by 7",
    ),
    "wrong share": (
        lambda x, w, b: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) * 0.25 + 1e-5),
        "the sum over 8 values is multiplied by 0.25",
    ),
    "another value": (lambda x, w, b: (x + 1) * torch.rsqrt(mean_square(x) + 1e-5), "is squared, but"),
    "cube": (lambda x, w, b: x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True) + 1e-5), "the constant is 3, not 2"),
    "mean used elsewhere": (
        lambda x, w, b: (x * torch.rsqrt(mean_square(x) + 1e-5), mean_square(x)),
        "is also used by",
    ),
}


@pytest.mark.parametrize("name", RMS_REFUSED)
def test_rms_norm_refuses(name: str) -> None:
    spelling, reason = RMS_REFUSED[name]
    program, _ = traced(spelling)
    gw.EliminateCommonSubexpressions()(program)
    assert not FuseRMSNorm()(program)
    assert reason in refusals(FuseRMSNorm(), program)


def test_rms_norm_refuses_narrowing_casts() -> None:
    """float32 on the way through a float64 model rounds, which the operator would not."""
    program, _ = traced(lambda x, w, b: x * torch.rsqrt(mean_square(x.float()) + 1e-5), torch.float64)
    assert not FuseRMSNorm()(program)
    assert "is squared, but" in refusals(FuseRMSNorm(), program)

    def through_float32(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        narrow = x.float()
        return (narrow * torch.rsqrt(mean_square(narrow) + 1e-5)).double()

    program, _ = traced(through_float32, torch.float64)
    assert "which its input was not" in refusals(FuseRMSNorm(), program)
    assert FuseRMSNorm()(program)
    gw.RemoveDeadCode()(program)
    assert operators(program) == ["aten.to.dtype", "graphwright.rms_norm", "aten.to.dtype"]


@pytest.mark.parametrize(
    ("factor", "reason"),
    [
        (lambda w: w.unsqueeze(0), "does not have the normalised shape"),
        (lambda w: w.sum(), "does not have the normalised shape"),
        (lambda w: w.double(), "the result is f64"),
    ],
    ids=["matrix", "number", "wider"],
)
def test_rms_norm_refuses_as_weight(factor: Callable[[torch.Tensor], torch.Tensor], reason: str) -> None:
    program, x = traced(lambda x, w, b: factor(w) * (x * torch.rsqrt(mean_square(x) + 1e-5)))
    before = program.clone()
    assert FuseRMSNorm()(program)
    (norm,) = [node for node in program.nodes if gw.op_name(node) == "graphwright.rms_norm"]
    assert norm.args[1] is None
    assert reason in refusals(FuseRMSNorm(), before)
    torch.testing.assert_close(program(x), before(x), rtol=1e-6, atol=1e-6)


def test_rms_norm_refuses_several_axes_of_torch() -> None:
    x = torch.randn(2, 5, WIDTH)
    program = gw.trace(nn.RMSNorm((5, WIDTH), eps=1e-5), x, dynamic=None)
    assert not FuseRMSNorm()(program)
    assert "last 2 axes" in refusals(FuseRMSNorm(), program)


def with_epsilon(eps: float) -> Spelling:
    return lambda x, w, b: x * torch.rsqrt(mean_square(x) + eps)


def test_rms_norm_epsilon_is_kept() -> None:
    for eps in (1e-5, 1e-6, 1e-12):
        program, _ = traced(with_epsilon(eps))
        FuseRMSNorm()(program)
        assert [node.args[2] for node in program.nodes if node.op == "call_function"] == [eps]


# -- layer norm --------------------------------------------------------------------------------------------------------


def centred(x: torch.Tensor) -> torch.Tensor:
    return x - x.mean(-1, keepdim=True)


def with_var_mean(x: torch.Tensor) -> torch.Tensor:
    variance, mean = torch.var_mean(x, -1, keepdim=True, correction=0)
    return (x - mean) * torch.rsqrt(variance + 1e-5)


LAYER_NORMS: dict[str, Spelling] = {
    "squares": lambda x, w, b: centred(x) / torch.sqrt(centred(x).pow(2).mean(-1, keepdim=True) + 1e-5),
    "product": lambda x, w, b: centred(x) * torch.rsqrt((centred(x) * centred(x)).mean(-1, keepdim=True) + 1e-5),
    "var": lambda x, w, b: centred(x) / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-5),
    "var, correction": lambda x, w, b: centred(x) / torch.sqrt(torch.var(x, -1, correction=0, keepdim=True) + 1e-5),
    "var of the centred": lambda x, w, b: centred(x) * torch.rsqrt(centred(x).var(-1, False, keepdim=True) + 1e-5),
    "var_mean": lambda x, w, b: with_var_mean(x),
    "std": lambda x, w, b: centred(x) / torch.sqrt(torch.std(x, -1, unbiased=False, keepdim=True) ** 2 + 1e-5),
    "sums": lambda x, w, b: (
        (x - x.sum(-1, keepdim=True) / WIDTH)
        / (((x - x.sum(-1, keepdim=True) / WIDTH) ** 2).sum(-1, keepdim=True) / WIDTH + 1e-5) ** 0.5
    ),
    "positive axis": lambda x, w, b: (x - x.mean(2, keepdim=True)) * (x.var(2, False, keepdim=True) + 1e-5) ** -0.5,
}
AFFINE: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "plain": lambda y, w, b: y,
    "weight": lambda y, w, b: y * w,
    "bias": lambda y, w, b: y + b,
    "weight and bias": lambda y, w, b: b + w * y,
    "addcmul": lambda y, w, b: torch.addcmul(b, w, y),
}


# Weight and bias are matched apart from the norm, so all their spellings need to be seen with two of it only.
LAYER_NORM_CASES = [
    (name, affine, dtype)
    for name in LAYER_NORMS
    for affine in AFFINE
    for dtype in (torch.float64, torch.float32)
    if name in ("squares", "var_mean") or (affine in ("plain", "weight and bias") and dtype == torch.float64)
]


@pytest.mark.parametrize(("name", "affine", "dtype"), LAYER_NORM_CASES, ids=str)
def test_layer_norm(name: str, affine: str, dtype: torch.dtype) -> None:
    program, x = traced(lambda x, w, b: AFFINE[affine](LAYER_NORMS[name](x, w, b), w, b), dtype)
    before = program.clone()
    assert FuseLayerNorm()(program)
    assert operators(program) == ["aten.layer_norm"]
    (norm,) = [node for node in program.nodes if node.op == "call_function"]
    arguments = arguments_of(norm)
    assert arguments["eps"] == 1e-5
    assert (arguments["weight"] is not None) == (affine not in ("plain", "bias"))
    assert (arguments["bias"] is not None) == (affine not in ("plain", "weight"))
    assert_equivalent(before, program, x)
    assert not FuseLayerNorm()(program)


def test_layer_norm_text(listing: Listing) -> None:
    def spelling(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        difference = x - x.mean(-1, keepdim=True)
        return difference / torch.sqrt(difference.pow(2).mean(-1, keepdim=True) + 1e-12) * w + b

    program, _ = traced(spelling)
    assert listing(program) == [
        "%mean = aten.mean.dim(%x, [-1], True)",
        "%sub = aten.sub.Tensor(%x, %mean)",
        "%pow_1 = aten.pow.Tensor_Scalar(%sub, 2)",
        "%mean_1 = aten.mean.dim(%pow_1, [-1], True)",
        "%add = aten.add.Tensor(%mean_1, 1e-12)",
        "%sqrt = aten.sqrt(%add)",
        "%div = aten.div.Tensor(%sub, %sqrt)",
        "%mul = aten.mul.Tensor(%div, %weight)",
        "%add_1 = aten.add.Tensor(%mul, %bias)",
    ]
    FuseLayerNorm()(program)
    (line,) = listing(program)
    assert line.endswith("= aten.layer_norm(%x, [8], %weight, %bias, 1e-12)")


def test_layer_norm_over_two_axes() -> None:
    x = torch.randn(3, 5, WIDTH, dtype=torch.float64)

    def spelling(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        difference = x - x.mean((1, 2), keepdim=True)
        return difference * torch.rsqrt(difference.pow(2).mean((-1, -2), keepdim=True) + 1e-5)

    program = gw.trace(Spelled(spelling), x, dynamic={"x": {0: "batch"}})
    before = program.clone()
    assert FuseLayerNorm()(program)
    assert operators(program) == ["aten.layer_norm"]
    assert_equivalent(before, program, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_layer_norm_takes_in_casts(dtype: torch.dtype) -> None:
    """Computed in float32 throughout, as for Whisper and many vision models."""
    program, x = traced(
        lambda x, w, b: functional.layer_norm(x.float(), (WIDTH,), w.float(), b.float(), 1e-5).to(x.dtype), dtype
    )
    before = program.clone()
    assert FuseLayerNorm()(program)
    gw.RemoveDeadCode()(program)
    assert operators(program) == ["aten.layer_norm"]
    assert_equivalent(before, program, x)


LAYER_NORM_REFUSED: dict[str, tuple[Spelling, str]] = {
    "first axis": (
        lambda x, w, b: (x - x.mean(1, keepdim=True)) / torch.sqrt(x.var(1, False, keepdim=True) + 1e-5),
        "not over the last",
    ),
    "varying size": (
        lambda x, w, b: (
            (x - x.mean((1, 2), keepdim=True)) / torch.sqrt(x.var((1, 2), unbiased=False, keepdim=True) + 1e-5)
        ),
        "varies",
    ),
    "unbiased": (lambda x, w, b: centred(x) / torch.sqrt(x.var(-1, keepdim=True) + 1e-5), "unbiased"),
    "epsilon outside": (
        lambda x, w, b: centred(x) / (x.std(-1, unbiased=False, keepdim=True) + 1e-5),
        "epsilon is added to the root, not under it",
    ),
    "no epsilon": (lambda x, w, b: centred(x) / torch.sqrt(x.var(-1, False, keepdim=True)), "no epsilon"),
    "wrong count": (
        lambda x, w, b: centred(x) / torch.sqrt(centred(x).pow(2).sum(-1, keepdim=True) / 7 + 1e-5),
        "the sum over 8 values is divided by 7",
    ),
    "variance used elsewhere": (
        lambda x, w, b: (
            centred(x) / torch.sqrt(x.var(-1, False, keepdim=True) + 1e-5),
            x.var(-1, False, keepdim=True),
        ),
        "is also used by",
    ),
    "centred twice as much": (
        lambda x, w, b: (
            torch.sub(x, x.mean(-1, keepdim=True), alpha=2) * torch.rsqrt(x.var(-1, False, keepdim=True) + 1e-5)
        ),
        "the constant is 2, not 1",
    ),
    "another value": (
        lambda x, w, b: centred(x) / torch.sqrt((x * 2).var(-1, False, keepdim=True) + 1e-5),
        "two places for 'x' hold different values",
    ),
}


@pytest.mark.parametrize("name", LAYER_NORM_REFUSED)
def test_layer_norm_refuses(name: str) -> None:
    spelling, reason = LAYER_NORM_REFUSED[name]
    program, _ = traced(spelling)
    gw.EliminateCommonSubexpressions()(program)
    assert not FuseLayerNorm()(program)
    assert reason in refusals(FuseLayerNorm(), program)


@pytest.mark.parametrize(
    ("affine", "reason"),
    [
        (lambda y, w: y * w.unsqueeze(0), "does not have the normalised shape"),
        (lambda y, w: y + w.sum(), "does not have the normalised shape"),
        (lambda y, w: y * w.double(), "the result is f64"),
        (lambda y, w: y * w.to(torch.bfloat16), "the weight is bf16, the norm f32"),
    ],
    ids=["matrix", "number", "wider", "narrower"],
)
def test_layer_norm_refuses_as_weight_or_bias(affine: Callable[..., torch.Tensor], reason: str) -> None:
    def spelling(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return affine(functional.layer_norm(x, (WIDTH,)), w)

    program, x = traced(spelling)
    gw.RemoveDeadCode()(program)
    before = program.clone()
    assert not FuseLayerNorm()(program)
    assert reason in refusals(FuseLayerNorm(), program)
    torch.testing.assert_close(program(x), before(x))


def test_weight_of_a_sum_is_not_taken_in() -> None:
    """(norm + bias) * weight is no layer norm with weight and bias."""
    program, x = traced(lambda x, w, b: (functional.layer_norm(x, (WIDTH,)) + b) * w, torch.float64)
    before = program.clone()
    assert FuseLayerNorm()(program)
    assert operators(program) == ["aten.layer_norm", "aten.mul.Tensor"]
    assert_equivalent(before, program, x)


def test_where_and_tags_are_respected() -> None:
    program, _ = traced(RMS_PLAIN["no weight"])
    assert not FuseRMSNorm(ignore=lambda node: True)(program)
    for node in program.nodes:
        add_tags(node, {"adapter"})
    assert not FuseRMSNorm()(program)
    assert "tagged adapter" in refusals(FuseRMSNorm(), program)


def test_gradients_flow_through_the_fused_norms() -> None:
    for item, spelling in (
        (FuseRMSNorm(), RMS_WITH_WEIGHT["gemma"]),
        (FuseLayerNorm(), lambda x, w, b: LAYER_NORMS["squares"](x, w, b) * w + b),
    ):
        program, x = traced(spelling, torch.float64)
        before = program.clone()
        assert item(program)
        for one in (before, program):
            one.zero_grad()
            one(x).pow(3).sum().backward()
            grads = [weight.grad.clone() for weight in one.parameters()]
            if one is before:
                expected = grads
        for found, wanted in zip(grads, expected, strict=True):
            assert math.isfinite(float(found.sum()))
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
