"""``SplitOutlierColumns``: large features get a linear of their own, and quantisation leaves it alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import graphwright as gw
from graphwright.ir.provenance import add_tags

Listing = Callable[[gw.Program], list[str]]
LARGE = [3, 17]


def inputs(*shape: int, seed: int = 0) -> torch.Tensor:
    """Features 3 and 17 are large."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).clamp(-4, 4)
    x[..., LARGE] *= 50
    x[0, ..., LARGE] = 40.0
    return x


X = inputs(2, 5, 32)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(32, 24), nn.Linear(32, 24, bias=False)
        self.down = nn.Linear(24, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down(torch.tanh(self.gate(x)) * torch.tanh(self.up(x)))
        return y


class Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(32, 24)), nn.Parameter(torch.randn(24))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.bias, x, self.weight)


def reasons(program: gw.Program, item: gw.Pass) -> dict[str, str]:
    return {refusal.node: refusal.reason for refusal in item.refusals(program)}


def split(**options: object) -> gw.SplitOutlierColumns:
    return gw.SplitOutlierColumns(**{"calibration": [X], **options})


# -- the rewrite -------------------------------------------------------------------------------------------------------


def test_before_and_after(listing: Listing) -> None:
    model = Mlp()
    program = gw.trace(model, X)
    item = split()
    assert item(program) is True
    assert listing(program) == [
        "%outliers_features = aten.index_select(%x, -1, %gate_outliers_features)",
        "%linear_6 = aten.linear(%outliers_features, %up_outliers_weight)",
        "%linear_4 = aten.linear(%outliers_features, %gate_outliers_weight)",
        "%rest_features = aten.index_select(%x, -1, %gate_rest_features)",
        "%linear_5 = aten.linear(%rest_features, %up_rest_weight)",
        "%add_1 = aten.add.Tensor(%linear_5, %linear_6)",
        "%linear_3 = aten.linear(%rest_features, %gate_rest_weight, %gate_bias)",
        "%add = aten.add.Tensor(%linear_3, %linear_4)",
        "%tanh = aten.tanh(%add)",
        "%tanh_1 = aten.tanh(%add_1)",
        "%mul = aten.mul.Tensor(%tanh, %tanh_1)",
        "%linear_2 = aten.linear(%mul, %down_weight, %down_bias)",
    ]
    tensors = program.tensors()
    assert tensors["gate.outliers.features"].tolist() == LARGE
    assert torch.equal(tensors["gate.outliers.weight"], model.gate.weight[:, LARGE])
    assert tensors["up.rest.weight"].shape == (24, 30)
    assert "gate.weight" not in tensors
    assert isinstance(tensors["up.rest.weight"], nn.Parameter)
    torch.testing.assert_close(program(X), model(X), rtol=1e-4, atol=1e-5)
    gw.verify(program)
    assert item(program) is False
    assert reasons(program, item)["linear_3"] == "its outliers are split off already"


def test_linears_stored_the_other_way_round() -> None:
    x = X.flatten(0, 1)
    model = Transposed()
    program = gw.trace(model, x)
    assert split(calibration=[x])(program)
    assert program.tensors()["outliers.weight"].shape == (24, 2)
    torch.testing.assert_close(program(x), model(x), rtol=1e-4, atol=1e-4)


@given(st.integers(1, 31), st.integers(0, 3), st.booleans())
@settings(max_examples=6, deadline=None)
def test_any_split_is_exact(count: int, seed: int, bias: bool) -> None:
    torch.manual_seed(seed)
    x = inputs(3, 32, seed=seed)
    done = gw.optimize(gw.trace(nn.Linear(32, 5, bias), x), [split(count=count, calibration=[x])], example_inputs=(x,))
    sizes = x.abs().amax(0)
    chosen = next(value for name, value in done.tensors().items() if name.endswith("outliers.features"))
    assert len(chosen) == count
    others = [place for place in range(32) if place not in chosen.tolist()]
    assert not others or sizes[chosen].min() >= sizes[others].max()


# -- with quantisation -------------------------------------------------------------------------------------------------


def error(model: nn.Module, passes: list[gw.Pass], x: torch.Tensor = X) -> float:
    """Of the outputs but for what the large features give: that is exact here, and hides the rest."""
    small = x.clone()
    small[..., LARGE] = 0
    done = gw.optimize(gw.trace(model, x), passes, example_inputs=(x,))
    with torch.no_grad():
        size = (model(small) - model(torch.zeros_like(x))).norm()
        return float((done(x) - model(x)).norm() / size)


def test_llm_int8_keeps_large_features_from_stretching_the_range() -> None:
    model, int8 = nn.Linear(32, 24), gw.QuantizeLinears(activations="int8")
    with_split, without = error(model, [split(threshold=6.0), int8]), error(model, [int8])
    assert with_split < 0.02 < without
    done = gw.optimize(gw.trace(model, X), [split(), int8], example_inputs=(X,))
    kinds = {gw.op_name(node) for node in done.nodes if node.op == "call_function"}
    assert kinds == {"aten.index_select", "aten.linear", "aten.add.Tensor", "graphwright.linear_int8_dynamic"}
    assert done.tensors()["rest.qweight"].shape == (24, 30)


def test_four_bit_activations_need_the_split() -> None:
    model = nn.Linear(32, 24)
    quik = gw.QuantizeLinears(bits=4, activations="int4")
    assert error(model, [split(count=2), quik]) < 0.2 < 1 < error(model, [quik])
    done = gw.optimize(gw.trace(model, X), [split(count=2), quik], example_inputs=(X,))
    (node,) = [node for node in done.nodes if "nbits" in gw.op_name(node)]
    assert node.args[5:] == (4, 30, 4, "per_token")


def test_a_split_model_is_saved_and_loaded(tmp_path: Path) -> None:
    program = gw.trace(Mlp(), X)
    split(count=2)(program)
    gw.QuantizeLinears(bits=4, activations="int4")(program)
    program.save(tmp_path / "model")
    loaded = gw.Program.load(tmp_path / "model")
    assert torch.equal(loaded(X), program(X))
    assert "outlier" in {tag for node in loaded.nodes for tag in gw.tags_of(node)}
    assert gw.QuantizeLinears()(loaded) is False


# -- what it leaves alone ----------------------------------------------------------------------------------------------


def test_linears_without_large_features() -> None:
    program = gw.trace(Mlp(), X)
    found = reasons(program, split())
    assert found["linear_2"].startswith("none of its input features reaches 6: the largest is ")
    assert reasons(program, split(count=24))["linear_2"] == "it has 24 input features, and 24 were to be taken out"
    everything = reasons(program, split(threshold=1e-6))["linear_2"]
    assert everything == "all of its input features reach 1e-06, and nothing would be left"


def test_linears_that_are_not_chosen() -> None:
    program = gw.trace(Mlp(), X)
    add_tags(next(node for node in program.nodes if node.name == "linear"), ["adapter"])
    found = reasons(program, split(ignore="up"))
    assert found["linear"] == "it is tagged adapter, which this pass leaves alone"
    assert found["linear_1"] == "not selected by where= / ignore="


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.lm_head = nn.Linear(32, 32, bias=False), nn.Linear(32, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.lm_head(self.one(self.one(x)))
        return y


def test_shared_weights_and_heads() -> None:
    program = gw.trace(Shared(), X)
    found = reasons(program, split(count=2))
    assert found["linear"] == "its weight is also read by %linear_1, whose inputs are others"
    assert found["linear_2"].startswith("it is the output head")
    assert split(count=2, lm_head=True)(program)


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"threshold": 6.0, "count": 3}, "features are chosen by one of the two"),
        ({"threshold": -1.0}, "must be a positive number, not -1.0"),
        ({"count": 0}, "must be a number from 1 on, not 0"),
        ({"count": True}, "must be a number from 1 on, not True"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, object], words: str) -> None:
    with pytest.raises(gw.InputError, match=words):
        split(**options)


def test_calibration_data_is_needed_and_must_serve() -> None:
    program = gw.trace(Mlp(), X)
    with pytest.raises(gw.InputError, match=r"needs calibration data"):
        gw.SplitOutlierColumns()(program)
    with pytest.raises(gw.InputError, match=r"there is no calibration data"):
        split(calibration=[])(program)
    overflowing = Mlp()
    nn.init.constant_(overflowing.down.weight, 1.0)
    nn.init.constant_(overflowing.gate.weight, torch.inf)
    with pytest.raises(gw.InputError, match=r"is NaN or infinite on the calibration data"):
        split()(gw.trace(overflowing, X))
    assert split().options() == {"calibration": "1 batches"}


def test_order() -> None:
    with pytest.raises(gw.OrderError, match="'split-outlier-columns' must come before 'quantize-linears'"):
        gw.optimize(gw.trace(Mlp(), X), [gw.QuantizeLinears(), split()], example_inputs=(X,))
