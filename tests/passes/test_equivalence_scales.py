"""SmoothQuant's, AWQ's and TEQ's factors, and ranges clipped by what the outputs lose."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import graphwright as gw
from graphwright.passes.calibration import Observed
from graphwright.passes.quantization.equivalence.salient import relative_sizes, rounded, salient_factors
from graphwright.passes.quantization.equivalence.smoothing import smoothing
from graphwright.passes.quantization.equivalence.trained import straight_through
from graphwright.passes.quantization.formats import Format
from graphwright.passes.quantization.rounding.clipped import ClippedNearest

THREE = Format(3, 16, True, False)


class Outlying(nn.Module):
    """A block whose inputs have a few features much larger than the others."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.up, self.down = nn.Linear(32, 48), nn.Linear(48, 32)
        with torch.no_grad():
            self.norm.weight[::11] = 12.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down(torch.relu(self.up(self.norm(x))))
        return y


def inputs() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 6, 32, generator=generator) for _ in range(4)]


def loss(program: gw.Program, exact: nn.Module, form: Format) -> float:
    """Squared error of the outputs with weights of linears rounded to the nearest."""
    trial = program.clone()
    with trial.edit() as rewriter:
        for node in trial.nodes:
            if node.op == "get_attr" and trial.tensor(node).dim() == 2:
                rewriter.rebind(node, rounded(trial.tensor(node).detach(), form))
    with torch.no_grad():
        return sum(float((trial(x) - exact(x)).square().sum()) for x in inputs())


def test_smoothing_is_equation_4() -> None:
    largest, columns = torch.tensor([8.0, 2.0, 0.5]), torch.tensor([0.5, 2.0, 1.0])
    assert torch.allclose(smoothing(largest, columns, 0.5), torch.tensor([4.0, 1.0, 0.5**0.5]))
    assert torch.allclose(smoothing(largest, columns, 1.0), largest)
    assert torch.isfinite(smoothing(torch.zeros(3), torch.zeros(3), 0.5)).all()


def test_salient_factors_and_sizes_by_hand() -> None:
    mean = torch.tensor([1.0, 4.0, 16.0])
    assert torch.allclose(salient_factors(mean, None, 0.5), torch.tensor([0.5, 1.0, 2.0]))
    assert torch.allclose(salient_factors(mean, None, 0.0), torch.ones(3))
    sizes = relative_sizes([torch.tensor([[1.0, -2.0, 3.0, 1.0]])], Format(4, 2, True, False))
    assert torch.allclose(sizes, torch.tensor([0.5, 1.0, 1.0, 1 / 3]))


@pytest.mark.parametrize(
    "method",
    [
        gw.ScaleSalientChannels(bits=3, group_size=16, calibration=inputs()),
        gw.ScaleSalientChannels(bits=3, group_size=16, calibration=inputs(), balance=True, fold="multiply"),
        gw.TrainEquivalentScales(bits=3, group_size=16, calibration=inputs(), steps=60, learning_rate=0.05),
    ],
    ids=["awq", "awq by multiplications", "teq"],
)
def test_factors_make_rounding_hurt_less(method: gw.Pass) -> None:
    torch.manual_seed(2)
    model = Outlying().eval()
    found = gw.optimize(model, [method], example_inputs=inputs()[0])
    assert found.report.rows[0].notes["folded" if method.fold == "auto" else "multiplied"] > 0  # type: ignore[attr-defined]
    plain = gw.trace(model, example_inputs=inputs()[0])
    assert loss(found, model, THREE) < 0.9 * loss(plain, model, THREE)


def test_smoothing_helps_static_int8_activations() -> None:
    torch.manual_seed(2)
    program = gw.trace(Outlying().eval(), example_inputs=inputs()[0])
    smooth = gw.optimize(program, [gw.SmoothActivations(calibration=inputs())], example_inputs=inputs()[0])
    errors = []
    for each in (program, smooth):
        small = gw.optimize(
            each,
            [gw.QuantizeLinears(activations="int8", activation_ranges="per_tensor")],
            example_inputs=inputs()[0],
        )
        errors.append(sum(float((small(x) - program(x)).square().sum()) for x in inputs()))
    assert errors[1] < 0.7 * errors[0]


@pytest.mark.parametrize("symmetric", [True, False])
def test_gradients_of_rounding_are_those_of_the_formula(symmetric: bool) -> None:
    """Factors that scale a whole group scale its values; a clipped weight has no gradient of its own."""
    form = Format(3, 4, symmetric, False)
    weight = torch.randn(2, 6)
    factor = torch.tensor(1.0, requires_grad=True)
    value = straight_through(weight * factor, form)
    assert torch.allclose(value.detach(), rounded(weight, form))
    (gradient,) = torch.autograd.grad(value.sum(), factor)
    within = (rounded(weight, form) - weight).abs() <= 0.501 * _scales(weight, form).abs()
    # d value = value dc/c + within (dw - w dc/c), with dc/c = 1 and dw = w here: the last two cancel.
    assert within.any()
    assert torch.allclose(gradient, rounded(weight, form).sum(), atol=1e-4)


def _scales(weight: torch.Tensor, form: Format) -> torch.Tensor:
    parts = [form.fit(piece)[0].unsqueeze(1).expand_as(piece) for piece in weight.split(4, 1)]
    return torch.cat(parts, 1)


def test_clipped_ranges_lose_less_of_the_outputs_than_full_ones() -> None:
    x = torch.randn(200, 40) @ torch.randn(40, 40)
    weight = torch.randn(24, 40).pow(3)
    observed = Observed.over([x])
    found = ClippedNearest().codes(weight, THREE, observed)
    nearest = rounded(weight, THREE)
    plain = float(((nearest - weight) @ x.T).square().sum() / (weight @ x.T).square().sum()) ** 0.5
    assert found.loss.relative < 0.98 * plain
    dense = torch.cat(
        [
            THREE.values(found.codes[:, place : place + 16].float(), found.scales[:, index], found.zeros[:, index])
            for index, place in enumerate(range(0, 40, 16))
        ],
        1,
    )
    error = float(((dense - weight) @ x.T).square().sum() / (weight @ x.T).square().sum()) ** 0.5
    assert found.loss.relative == pytest.approx(error, rel=1e-3)


def test_awq_as_a_whole() -> None:
    torch.manual_seed(2)
    model = Outlying().eval()
    scale = gw.ScaleSalientChannels(bits=4, group_size=16, calibration=inputs())
    quantize = gw.QuantizeLinears(bits=4, group_size=16, clip_search=False, rounding="awq-clip", calibration=inputs())
    small = gw.optimize(model, [scale, quantize], example_inputs=inputs()[0])
    plain = gw.optimize(
        model, [gw.QuantizeLinears(bits=4, group_size=16, clip_search=False)], example_inputs=inputs()[0]
    )
    with torch.no_grad():
        errors = [sum(float((each(x) - model(x)).square().sum()) for x in inputs()) for each in (small, plain)]
    assert errors[0] < 0.6 * errors[1]
    assert small.report.rows[1].notes["linears"] == 2


BAD: list[tuple[type[Any], dict[str, Any], str]] = [
    (gw.ScaleSalientChannels, {"bits": 1}, "bits"),
    (gw.ScaleSalientChannels, {"group_size": 0}, "group_size"),
    (gw.ScaleSalientChannels, {"ratios": 0}, "ratios"),
    (gw.ScaleSalientChannels, {"balance": "maybe"}, "balance"),
    (gw.TrainEquivalentScales, {"bits": True}, "bits"),
    (gw.TrainEquivalentScales, {"steps": 0}, "steps"),
    (gw.TrainEquivalentScales, {"learning_rate": 2.0}, "learning_rate"),
]


@pytest.mark.parametrize(("kind", "options", "word"), BAD)
def test_bad_options(kind: type[Any], options: dict[str, Any], word: str) -> None:
    with pytest.raises(gw.InputError, match=word):
        kind(calibration=inputs(), **options)


def test_bad_options_of_clipping() -> None:
    for options, word in (({"steps": 0}, "steps"), ({"least": 1.0}, "least")):
        with pytest.raises(gw.InputError, match=word):
            ClippedNearest(**options)
