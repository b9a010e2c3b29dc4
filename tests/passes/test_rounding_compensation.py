"""Low-rank branches beside quantised linears."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graphwright as gw
from graphwright.passes.quantization.compensation import low_rank
from graphwright.passes.quantization.linears import QuantizeLinears

X = torch.randn(64, 48, generator=torch.Generator().manual_seed(3)) * torch.linspace(0.1, 2.0, 48)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(48, 64)
        self.down = nn.Linear(64, 48, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down(torch.relu(self.up(x)))
        return y


class Odd(nn.Module):
    """A weight stored ``[in, out]``, read twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(48, 48) / 7)
        self.bias = nn.Parameter(torch.randn(48))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(torch.addmm(self.bias, x, self.weight))
        return torch.addmm(self.bias, hidden, self.weight)


def quantised(model: nn.Module, **options: Any) -> gw.Program:
    program = gw.trace(model, X)
    assert QuantizeLinears(bits=4, group_size=16, **options)(program)
    gw.verify(program)
    return program


def error(program: gw.Program, model: nn.Module) -> float:
    with torch.no_grad():
        exact = model(X)
        return float((program(X) - exact).norm() / exact.norm())


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("rank", [1, 6, 30])
def test_the_branch_is_the_closest_of_its_rank(weighted: bool, rank: int) -> None:
    """Against a full decomposition in float64."""
    torch.manual_seed(1)
    residual, x = torch.randn(40, 30), torch.randn(200, 30) @ torch.randn(30, 30)
    moment = (x.T @ x) if weighted else None
    root = torch.linalg.cholesky(x.double().T @ x.double()) if weighted else torch.eye(30, dtype=torch.float64)
    b, a = low_rank(residual, rank, moment)
    assert b.shape == (40, rank)
    assert a.shape == (rank, 30)
    left = float(torch.linalg.norm((residual - b @ a).double() @ root) ** 2)
    values = torch.linalg.svdvals(residual.double() @ root).square()
    assert left <= float(values[rank:].sum()) + 0.003 * float(values.sum())


def test_before_and_after(listing: Any) -> None:
    program = gw.trace(Mlp(), X)
    item = gw.QuantizeLinears(bits=4, group_size=16, where="up", compensation=gw.LowRank(rank=4, factors="float"))
    assert item(program) is True
    assert listing(program)[:4] == [
        "%linear_2 = aten.linear(%x, %up_low_rank_a)",
        "%linear_3 = aten.linear(%linear_2, %up_low_rank_b)",
        "%linear_nbits = graphwright.linear_nbits(%x, %up_qweight, %up_scales, None, %up_bias, 4, 16)",
        "%add = aten.add.Tensor(%linear_nbits, %linear_3)",
    ]
    marked = {node.name: gw.tags_of(node) for node in program.nodes if node.name in ("linear_2", "linear_3", "add")}
    assert all("compensation" in tags for tags in marked.values())
    assert len(marked) == 3
    assert item(program) is False
    assert not gw.QuantizeLinears(bits=8, where="up")(program)


@pytest.mark.parametrize("factors", ["int8", "float"])
@pytest.mark.parametrize("rounding", ["nearest", "gptq", "hqq"])
def test_a_branch_takes_error_away(factors: str, rounding: str) -> None:
    model = Mlp()
    calibration = [(X,)]
    plain = error(quantised(model, rounding=rounding, calibration=calibration), model)
    branch = gw.LowRank(rank=12, factors=factors)
    assert error(quantised(model, rounding=rounding, calibration=calibration, compensation=branch), model) < 0.8 * plain


def test_the_inputs_metric_keeps_more_than_the_weights() -> None:
    model = Mlp()
    found = [
        error(
            quantised(model, rounding="nearest", calibration=[(X,)], compensation=gw.LowRank(6, weighted=weighted)),
            model,
        )
        for weighted in (False, True)
    ]
    assert found[1] < 0.95 * found[0]


@pytest.mark.parametrize("compensation", [gw.LowRank(8), gw.LowRank(8, factors="float"), gw.LoftQ(8)])
def test_shared_and_transposed_weights(compensation: Any) -> None:
    model = Odd()
    program = quantised(model, compensation=compensation)
    assert sum("qweight" in name for name in program.tensors()) == (
        3 if getattr(compensation, "factors", "") == "int8" else 1
    )
    assert error(program, model) < 0.9 * error(quantised(model), model)


def test_loftq_gives_factors_that_train() -> None:
    model = Mlp()
    once, often = (quantised(model, compensation=gw.LoftQ(8, steps=steps)) for steps in (1, 5))
    trained = {name for name, tensor in once.tensors().items() if isinstance(tensor, nn.Parameter)}
    assert {f"{each}.loftq" for each in ("up.lora_A", "up.lora_B", "down.lora_A", "down.lora_B")} <= trained
    assert not any("qweight" in name for name in trained)
    assert all("adapter" in gw.tags_of(node) for node in once.nodes if node.name.startswith("up_lora"))
    once(X).square().sum().backward()
    gradient = once.tensors()["up.lora_B.loftq"].grad
    assert gradient is not None
    assert float(gradient.abs().max()) > 0
    tensors = often.tensors()

    def left(program: gw.Program) -> float:
        return error(program, model)

    assert left(often) < left(quantised(model))
    assert tensors["up.lora_A.loftq"].shape == (8, 48)


def test_activations_of_eight_bits() -> None:
    model = Mlp()
    program = gw.trace(model, X)
    gw.QuantizeLinears(activations="int8", calibration=[(X,)], compensation=gw.LowRank(8))(program)
    gw.verify(program)
    assert error(program, model) < 0.03


@pytest.mark.parametrize("factors", ["int8", "float"])
def test_the_branch_runs_in_every_backend(factors: str, tmp_path: Path) -> None:
    branch = gw.LowRank(8, factors=factors)
    small = gw.optimize(Mlp(), [gw.QuantizeLinears(bits=4, group_size=16, compensation=branch)], example_inputs=X)
    expected = small(X).detach()
    fast = gw.optimize(small, [], target=gw.CpuBackend())
    torch.testing.assert_close(fast(X), expected, rtol=1e-4, atol=1e-4)
    onnxruntime = pytest.importorskip("onnxruntime")
    gw.export_onnx(small, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: X.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gw.LowRank(0), "rank"),
        (lambda: gw.LowRank(True), "rank"),
        (lambda: gw.LowRank(factors="int4"), "factors"),
        (lambda: gw.LoftQ(steps=0), "steps"),
        (lambda: gw.QuantizeLinears(compensation=8), "compensation"),
    ],
)
def test_bad_options(make: Any, message: str) -> None:
    with pytest.raises(gw.InputError, match=message):
        make()
