"""Factors of features: where they go, that nothing changes, and what keeps them out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import graphwright as gw
from graphwright.ir.provenance import add_tags
from graphwright.passes.quantization.equivalence.absorbing import Absorption, absorption
from graphwright.passes.quantization.equivalence.features import of_features, regrouped
from graphwright.passes.quantization.equivalence.groups import Group, groups_of

X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(3))
RESPECTS = frozenset({"adapter"})


class Net(nn.Module):
    """A norm, two projections and whatever ``function`` makes of them."""

    def __init__(self, function: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.norm, self.rms = nn.LayerNorm(16), nn.RMSNorm(16)
        self.a, self.b, self.c = nn.Linear(16, 16), nn.Linear(16, 16, bias=False), nn.Linear(16, 16)
        self.k, self.v = nn.Linear(16, 8), nn.Linear(16, 8)
        self.function = function
        with torch.no_grad():
            for each in (self.norm, self.rms):
                each.weight.uniform_(0.5, 2.0)
            self.norm.bias.normal_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self, x)


def grouped(m: Any, x: torch.Tensor) -> torch.Tensor:
    """Attention with two query heads to a value head."""
    n = m.norm(x)
    q = m.a(n).view(2, -1, 4, 4).transpose(1, 2)
    k, v = (each(n).view(2, -1, 2, 4).transpose(1, 2) for each in (m.k, m.v))
    y = functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    result: torch.Tensor = m.c(y.transpose(1, 2).reshape(2, -1, 16))
    return result


FOLDED: dict[str, tuple[Callable[[Any, torch.Tensor], torch.Tensor], int]] = {
    "layer norm": (lambda m, x: x + m.a(m.norm(x)) + m.b(m.rms(x)), 2),
    "one norm, two linears": (lambda m, x: (lambda n: m.a(n) + m.b(n))(m.norm(x)), 1),
    "rms norm": (lambda m, x: m.a(m.rms(x)), 1),
    "relu": (lambda m, x: m.b(torch.relu(m.a(m.norm(x)))), 2),
    "gate": (lambda m, x: m.c(functional.silu(m.a(x)) * m.b(x)), 1),
    "grouped-query attention": (grouped, 2),
    "parts of a merged linear": (lambda m, x: m.c(torch.cat([m.a(x).split([4, 12], -1)[1], x[..., :4]], -1)), 0),
    "a multiplication that stands there": (lambda m, x: m.b(functional.gelu(m.a(x)) * m.rms.weight), 1),
}


@pytest.mark.parametrize("case", FOLDED)
def test_factors_go_where_nothing_changes(case: str) -> None:
    function, folded = FOLDED[case]
    model = Net(function).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    smooth = gw.SmoothActivations(calibration=[X], fold="only")
    found = gw.optimize(model, [smooth], example_inputs=X)  # the contract is verified node by node
    (row,) = found.report.rows
    assert row.notes.get("folded", 0) == folded
    assert row.changed == bool(folded)
    assert torch.allclose(found(X), model(X), atol=1e-5)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), "the original model was written into"


REFUSED: dict[str, tuple[Callable[[Any, torch.Tensor], torch.Tensor], str]] = {
    "gelu": (lambda m, x: m.b(functional.gelu(m.a(x))), "aten.gelu"),
    "silu": (lambda m, x: m.b(functional.silu(m.a(x))), "aten.silu"),
    "residual": (lambda m, x: (lambda n: n + m.a(n))(m.norm(x)), "is also read by"),
    "input": (lambda m, x: m.a(x), "is an input of the model"),
    "sum": (lambda m, x: m.a(m.norm(x) + x), "aten.add.Tensor"),
    "shared norm": (lambda m, x: m.a(m.norm(x)) + m.b(m.norm(x + 1)), "is also read by"),
    "square": (lambda m, x: (lambda y: m.b(y * y))(m.a(x)), "squares its input"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_absorb_factors_says_why_and_gets_a_multiplication(case: str) -> None:
    function, reason = REFUSED[case]
    program = gw.trace(Net(function).eval(), example_inputs=X)
    reasons = [item.reason for item in gw.SmoothActivations(calibration=[X], fold="only").refusals(program)]
    assert any(reason in each for each in reasons), reasons
    found = gw.optimize(program, [gw.SmoothActivations(calibration=[X])], example_inputs=X)
    assert found.report.rows[0].notes["multiplied"] > 0
    assert torch.allclose(found(X), program(X), atol=1e-5)


def test_heads_that_share_a_value_head_share_factors() -> None:
    program = gw.trace(Net(grouped).eval(), example_inputs=X)
    groups = [each for each in groups_of(program, lambda _: True, RESPECTS) if isinstance(each, Group)]
    found = absorption(program, groups[-1].x, {groups[-1].first}, RESPECTS)
    assert isinstance(found, Absorption)
    tied = found.tied(torch.arange(1.0, 17.0))
    heads = tied.view(4, 4)
    assert torch.equal(heads[0], heads[1])
    assert torch.equal(heads[2], heads[3])
    assert torch.allclose(heads[0], (torch.arange(1.0, 5.0) * torch.arange(5.0, 9.0)).sqrt())


def test_views_carry_features_past_sizes_that_vary() -> None:
    layout = of_features(("batch", "sequence", 12))
    read = regrouped(layout, ("batch", "sequence", 12), ("batch", "sequence", 3, 4))
    assert read is not None
    assert read.shape == (1, 1, 3, 4)
    assert torch.equal(read.flatten(), torch.arange(12))
    flat = regrouped(layout, ("batch", "sequence", 12), ("batch*sequence", 12))
    assert flat is not None
    assert flat.shape == (1, 12)
    assert regrouped(layout, ("batch", "sequence", 12), ("batch", "12*sequence")) is None


def test_protected_linears_are_left_alone() -> None:
    program = gw.trace(Net(lambda m, x: m.b(torch.relu(m.a(m.norm(x))))).eval(), example_inputs=X)
    first = next(node for node in program.nodes if "linear" in node.name)
    add_tags(first, ("adapter",))
    smooth = gw.SmoothActivations(calibration=[X], fold="only")
    reasons = [item.reason for item in smooth.refusals(program)]
    assert sum("tagged adapter" in each for each in reasons) == 2  # as a linear, and as what could absorb
    assert not smooth(program)


def test_half_precision_is_held_to_its_own_rounding() -> None:
    model = Net(lambda m, x: m.b(torch.relu(m.a(m.rms(x))))).eval().to(torch.bfloat16)
    x = X.to(torch.bfloat16)
    found = gw.optimize(model, [gw.SmoothActivations(calibration=[x])], example_inputs=x)
    assert found.report.rows[0].notes["folded"] == 2
    assert {tensor.dtype for tensor in found.tensors().values()} == {torch.bfloat16}


def test_order_options_and_bad_calibration_data() -> None:
    smooth = gw.SmoothActivations(calibration=[X])
    with pytest.raises(gw.OrderError, match="must come before"):
        gw.optimize(Net(FOLDED["relu"][0]).eval(), [gw.QuantizeLinears(), smooth], example_inputs=X)
    for options, word in (({"fold": "never"}, "fold"), ({"strength": 1.5}, "strength")):
        given: dict[str, Any] = {"calibration": [X], **options}
        with pytest.raises(gw.InputError, match=word):
            gw.SmoothActivations(**given)
    with pytest.raises(gw.InputError, match="needs calibration data"):
        gw.optimize(Net(FOLDED["relu"][0]).eval(), [gw.SmoothActivations()], example_inputs=X)
    with pytest.raises(gw.InputError, match="no calibration data"):
        gw.optimize(Net(FOLDED["relu"][0]).eval(), [gw.SmoothActivations(calibration=[])], example_inputs=X)
    with pytest.raises(gw.InputError, match="NaN"):
        gw.optimize(
            Net(FOLDED["relu"][0]).eval(), [gw.SmoothActivations(calibration=[X * float("nan")])], example_inputs=X
        )
