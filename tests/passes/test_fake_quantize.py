"""Quantisation-aware training: linears that round, train, and are stored as they were trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import graphwright as gw
from graphwright.ir.names import op_name

X = torch.randn(6, 5, 48, generator=torch.Generator().manual_seed(3))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(48, 64)
        self.up = nn.Linear(48, 64, bias=False)
        self.down = nn.Linear(64, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down(functional.silu(self.gate(x)) * self.up(x))
        return y


class Shared(nn.Module):
    """The same weight for two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(48, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.inner(torch.relu(self.inner(x)))
        return y


def operators(program: gw.Program) -> list[str]:
    return [op_name(node) for node in program.nodes if op_name(node).startswith(("graphwright", "aten.linear"))]


def inserted(model: nn.Module, **options: Any) -> gw.Program:
    program: gw.Program = gw.optimize(model, [gw.InsertFakeQuantize(**options)], example_inputs=X[:2])
    return program


def train(program: gw.Program, steps: int, wanted: torch.Tensor, rate: float = 0.003) -> list[float]:
    optimizer = torch.optim.Adam(program.parameters(), lr=rate)
    losses = []
    for _ in range(steps):
        loss = functional.mse_loss(program(X), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


FORMATS: list[dict[str, Any]] = [
    {"bits": 4, "group_size": 16},
    {"bits": 4, "group_size": 32, "symmetric": False},
    {"bits": 8},
    {"bits": 8, "symmetric": False, "clip_search": False},
]


def test_linears_round_what_they_read() -> None:
    program = inserted(Mlp(), bits=4, group_size=32)
    assert operators(program).count("graphwright.fake_quantize") == 3
    weight, scale = program.tensor("gate.weight"), program.tensor("gate.weight_scale")
    assert isinstance(weight, nn.Parameter)
    assert isinstance(scale, nn.Parameter)
    assert scale.shape == (64, 2)
    node = next(node for node in program.nodes if op_name(node) == "graphwright.fake_quantize")
    assert list(node.args[3:]) == [-8, 7, 32]


def test_linears_that_share_an_input_share_its_rounding() -> None:
    program = inserted(Mlp(), activations="int8", calibration=[X])
    assert operators(program).count("graphwright.fake_quantize") == 3 + 2
    names = [name for name, _ in program.named_parameters() if name.endswith("input_scale")]
    assert names == ["gate.input_scale", "down.input_scale"]


@pytest.mark.parametrize("options", FORMATS)
def test_training_brings_the_loss_down(options: dict[str, Any]) -> None:
    torch.manual_seed(1)
    program = inserted(Mlp(), **options)
    with torch.no_grad():
        wanted = Mlp()(X)
    losses = train(program, 40, wanted)
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("options", [*FORMATS, {"activations": "int8", "calibration": [X]}])
def test_what_was_trained_is_what_is_stored(options: dict[str, Any]) -> None:
    torch.manual_seed(1)
    program = inserted(Mlp(), **options)
    with torch.no_grad():
        wanted = Mlp()(X)
    before = {name: value.detach().clone() for name, value in program.named_parameters()}
    train(program, 5, wanted)
    moved = [name for name, value in program.named_parameters() if not torch.equal(value, before[name])]
    assert {"gate.weight", "gate.weight_scale"} <= set(moved)
    stored = gw.optimize(program, [gw.ConvertFakeQuantize()], example_inputs=X[:2])  # holds it to its exact contract
    kind = "graphwright.linear_int8_static" if "activations" in options else "graphwright.linear_nbits"
    assert operators(stored) == [kind] * 3
    with torch.no_grad():
        torch.testing.assert_close(stored(X), program(X), rtol=1e-5, atol=1e-5)
    assert all(name.endswith(("qweight", "scales", "zero_points", "bias")) for name in stored.tensors())
    again = stored.clone()
    assert not gw.ConvertFakeQuantize()(again)


@pytest.mark.parametrize(
    ("options", "kind"),
    [({"bits": 4}, "linear_nbits"), ({"activations": "int8", "calibration": [X]}, "linear_int8_static")],
)
def test_a_shared_weight_is_rounded_once_and_stays_shared(options: dict[str, Any], kind: str) -> None:
    program = inserted(Shared(), **options)
    assert sum(name.endswith("weight_scale") for name, _ in program.named_parameters()) == 1
    stored = gw.optimize(program, [gw.ConvertFakeQuantize()], example_inputs=X[:2])
    assert operators(stored) == [f"graphwright.{kind}"] * 2
    assert sum("qweight" in name for name in stored.tensors()) == 1


def test_a_saved_program_trains_on_and_converts(tmp_path: Path) -> None:
    program = inserted(Mlp(), bits=4, group_size=16)
    program.save(tmp_path / "saved")
    loaded = gw.Program.load(tmp_path / "saved")
    assert [name for name, _ in loaded.named_parameters()] == [name for name, _ in program.named_parameters()]
    with torch.no_grad():
        assert torch.equal(loaded(X), program(X))
    losses = train(loaded, 10, torch.zeros_like(X))
    assert losses[-1] < losses[0]
    stored = gw.optimize(loaded, [gw.ConvertFakeQuantize()], example_inputs=X[:2])
    assert "graphwright.linear_nbits" in operators(stored)


def test_conversion_needs_insertion() -> None:
    with pytest.raises(gw.OrderError, match="needs 'insert-fake-quantize' to have run before it"):
        gw.optimize(Mlp(), [gw.ConvertFakeQuantize()], example_inputs=X[:2])


def test_the_second_insertion_changes_nothing() -> None:
    program = inserted(Mlp(), bits=8)
    assert not gw.InsertFakeQuantize(bits=8)(program)


def test_where_it_does_not_fire() -> None:
    model = nn.Module()
    model.weight = nn.Parameter(torch.randn(48, 32))
    model.forward = lambda x: x @ model.weight
    program = gw.trace(model, X[:2])
    assert "is stored [in, out]" in gw.InsertFakeQuantize().refusals(program)[0].reason
    chosen = gw.InsertFakeQuantize(where="gate").refusals(gw.trace(Mlp(), X[:2]))
    assert {refusal.reason for refusal in chosen} == {"not selected by where= / ignore="}


def test_codes_that_no_packed_format_has_stay() -> None:
    program = inserted(Mlp(), bits=8)
    with program.edit() as rewriter:
        for node in program.nodes:
            if op_name(node) == "graphwright.fake_quantize":
                rewriter.set_arguments(node, *node.args[:3], -100, 100, node.args[5])
    refused = gw.ConvertFakeQuantize().refusals(program)
    assert [item.reason for item in refused] == ["its codes go from -100 to 100, which no packed format has"] * 3


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [("gate.weight", float("nan"), "training has diverged"), ("gate.weight_scale", 0.0, "holds a 0")],
)
def test_training_that_went_wrong_is_named(name: str, value: float, message: str) -> None:
    program = inserted(Mlp(), bits=4)
    with torch.no_grad():
        program.tensor(name)[0, 0] = value
    with pytest.raises(gw.InputError, match=message):
        gw.ConvertFakeQuantize()(program)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 5}, "bits"),
        ({"activations": "fp8"}, "must be 'none' or 'int8'"),
        ({"activations": "int8"}, "needs calibration data"),
        ({"activations": "int8", "calibration": [X], "bits": 4}, "symmetric INT8 weights"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(gw.InputError, match=message):
        gw.InsertFakeQuantize(**options)
