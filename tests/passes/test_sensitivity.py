"""Sensitivities: each measure against its definition, computed another way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import graphwright as gw
from graphwright.passes.quantization.formats import Format
from graphwright.passes.quantization.rounding import rounding_of
from graphwright.passes.quantization.sensitivity.candidates import rounded
from graphwright.passes.quantization.sensitivity.kurtosis import kurtosis
from graphwright.passes.quantization.weights import quantize_weight

CANDIDATES: list[Any] = [{"bits": 4, "group_size": 16}, {"bits": 8, "group_size": 16}, None]


class Small(nn.Module):
    """A language model of two linears and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(40, 32)
        self.up = nn.Linear(32, 48)
        self.down = nn.Linear(48, 32)
        self.lm_head = nn.Linear(32, 40, bias=False)

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.embed(input_ids)
        return {"logits": self.lm_head(x + self.down(functional.gelu(self.up(x))))}


def batches(count: int = 3) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(0, 40, (2, 9), generator=generator)} for _ in range(count)]


@pytest.fixture
def program() -> gw.Program:
    return gw.trace(Small(), batches(1)[0])


def loss_of(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    logits = model(**batch)["logits"]
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten())


def error_of(model: Small, name: str) -> torch.Tensor:
    weight = model.get_parameter(name).detach()
    return weight - quantize_weight(weight, Format(4, 16, True, True)).dense()


def test_first_order_is_gradient_times_error(program: gw.Program) -> None:
    table = gw.sensitivities(program, batches(), candidates=CANDIDATES, measure="first_order")
    assert [row.weight for row in table.linears] == ["up.weight", "down.weight"]
    model = Small()
    (sum(loss_of(model, batch) for batch in batches()) / 3).backward()
    for row in table.linears:
        gradient = model.get_parameter(row.weight).grad
        assert gradient is not None
        assert row.values[0] == pytest.approx(float((gradient * error_of(model, row.weight)).abs().sum()), rel=1e-4)
        assert row.values[2] == 0.0
        assert 0 < row.values[1] < 0.2 * row.values[0]


def test_fisher_is_the_mean_of_squares_over_rows(program: gw.Program) -> None:
    data = batches(2)
    table = gw.sensitivities(program, data, candidates=CANDIDATES, measure="fisher")
    model = Small()
    wanted = torch.zeros(32, 48)
    for batch in data:
        seen: dict[str, torch.Tensor] = {}
        handle = model.down.register_forward_hook(
            lambda _, inputs, output, seen=seen: (seen.update(x=inputs[0], y=output), output.retain_grad())[0]
        )
        loss_of(model, batch).backward()
        handle.remove()
        rows, count = seen["x"].detach().reshape(-1, 48), seen["x"].shape[0] * seen["x"].shape[1]
        for x, up in zip(rows, seen["y"].grad.reshape(-1, 32), strict=True):
            wanted += torch.outer(count * up, x).square() / count / 2
    expected = 0.5 * float((wanted * error_of(model, "down.weight").square()).sum())
    assert table.linears[1].values[0] == pytest.approx(expected, rel=1e-3)


def test_measured_loss_is_that_of_the_model_with_one_linear_quantised(program: gw.Program) -> None:
    table = gw.sensitivities(program, batches(), candidates=CANDIDATES, measure="loss")
    for row in table.linears:
        model = Small()
        base = sum(loss_of(model, batch).item() for batch in batches()) / 3
        with torch.no_grad():
            model.get_parameter(row.weight).sub_(error_of(model, row.weight))
        found = sum(loss_of(model, batch).item() for batch in batches()) / 3
        assert row.values[0] == pytest.approx(found - base, abs=1e-6)
        assert row.values[0] != row.values[1]


def test_output_error_and_sqnr(program: gw.Program) -> None:
    model = Small()
    output = gw.sensitivities(program, batches(), candidates=CANDIDATES, measure="output").linears[0].values[0]
    x = torch.cat([model.embed(batch["input_ids"]).flatten(0, 1) for batch in batches()]).detach()
    weight, error = model.up.weight.detach(), error_of(model, "up.weight")
    assert output == pytest.approx(float((x @ error.T).square().sum() / (x @ weight.T).square().sum()), rel=1e-3)
    noise = gw.sensitivities(program, candidates=CANDIDATES, measure="sqnr").linears[0]
    assert noise.values[0] == pytest.approx(float(error.square().sum() / weight.square().sum()), rel=1e-4)
    assert noise.kurtosis is None


def test_without_a_loss_fisher_foretells_how_much_the_outputs_change() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False)).eval()
    data = [torch.randn(256, 32) for _ in range(4)]
    program = gw.trace(model, data[0])
    foretold, measured = (
        gw.sensitivities(program, data, candidates=[{"bits": 4, "group_size": 16}], measure=measure)
        for measure in ("fisher", "loss")
    )
    for row, truth in zip(foretold.linears, measured.linears, strict=True):
        assert 2 * row.values[0] == pytest.approx(truth.values[0], rel=0.3)
    with pytest.raises(gw.InputError, match="needs a loss"):
        gw.sensitivities(program, data, measure="first_order")


def test_a_loss_of_ones_own_and_labels(program: gw.Program) -> None:
    data = [{**batch, "wanted": batch["input_ids"].roll(-1, 1)} for batch in batches()]
    for batch in data:
        batch["wanted"][:, -1] = -100
    usual = gw.sensitivities(program, batches(), candidates=CANDIDATES)
    labelled = gw.sensitivities(program, data, candidates=CANDIDATES, labels="wanted")

    def loss(outputs: Any, batch: Any) -> torch.Tensor:
        return functional.cross_entropy(outputs["logits"].flatten(0, 1), batch["wanted"].flatten())

    own = gw.sensitivities(program, data, candidates=CANDIDATES, loss=loss)
    for table in (labelled, own):
        for row, other in zip(table.linears, usual.linears, strict=True):
            assert row.values[0] == pytest.approx(other.values[0], rel=1e-4)


def test_a_shared_weight_is_one_row() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(32, 32, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.a(torch.relu(self.a(x)))
            return result

    torch.manual_seed(0)
    model, x = Twice(), torch.randn(8, 32)
    table = gw.sensitivities(
        gw.trace(model, x),
        [x],
        candidates=CANDIDATES,
        measure="first_order",
        loss=lambda outputs, _: outputs.square().mean(),
    )
    (row,) = table.linears
    model(x).square().mean().backward()
    weight = model.a.weight
    assert weight.grad is not None
    error = weight.detach() - quantize_weight(weight.detach(), Format(4, 16, True, True)).dense()
    assert row.values[0] == pytest.approx(float((weight.grad * error).abs().sum()), rel=1e-4)


@pytest.mark.parametrize("columns", [16, 40, 47, 64])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("method", ["nearest", "gptq"])
def test_rounded_values_and_bytes_are_those_of_the_pass(columns: int, symmetric: bool, method: str) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(columns, 12, bias=False), torch.randn(64, columns)
    program = gw.trace(linear, x)
    before = sum(tensor.numel() * tensor.element_size() for tensor in program.tensors().values())
    candidate = {"bits": 4, "group_size": 16, "symmetric": symmetric}
    table = gw.sensitivities(program, [x], candidates=[candidate, None], measure="loss", rounding=method)
    gw.QuantizeLinears(**candidate, rounding=method, calibration=[x])(program)
    after = sum(tensor.numel() * tensor.element_size() for tensor in program.tensors().values())
    assert table.linears[0].stored == (after, before)
    exact = linear(x)
    wanted = float(((program(x) - exact).norm() / exact.norm()) ** 2)
    assert table.linears[0].values[0] == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("bits", [2, 3])
def test_formats_of_few_bits(bits: int) -> None:
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    form = Format(bits, 32, True, True)
    values, size = rounded(weight, form, rounding_of("nearest", where=""), None)
    assert size == 6 * 2 * (32 * bits // 8 + 2)
    for row in values.reshape(12, 32):
        assert len(row.unique()) <= 2**bits


def test_kurtosis() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(500, 40, generator=generator) for _ in range(5)]
    assert kurtosis(rows) == pytest.approx(3.0, abs=0.1)
    assert kurtosis([row + 100 for row in rows]) == pytest.approx(3.0, abs=0.1)
    assert kurtosis([torch.ones(3, 4)]) == 0.0
    assert kurtosis([torch.tensor([[1.0, -1.0]])]) == pytest.approx(1.0)


def test_skip_by_kurtosis(program: gw.Program) -> None:
    table = gw.sensitivities(program, batches(), measure="kurtosis")
    tails = {row.weight: row.kurtosis or 0.0 for row in table.linears}
    highest = max(tails, key=lambda name: tails[name])
    assert gw.skip_by_kurtosis(table, count=1) == {highest: None}
    assert gw.skip_by_kurtosis(table, fraction=0.5) == {highest: None}
    assert gw.skip_by_kurtosis(table, count=0) == {}
    for options in ({}, {"count": 1, "fraction": 0.5}, {"count": 3}, {"fraction": 1.5}, {"count": True}):
        with pytest.raises(gw.InputError, match="skip_by_kurtosis"):
            gw.skip_by_kurtosis(table, **options)
    with pytest.raises(gw.InputError, match="no kurtosis"):
        gw.skip_by_kurtosis(gw.sensitivities(program, measure="sqnr"), count=1)


def test_the_table_prints_and_comes_back_from_json(program: gw.Program) -> None:
    table = gw.sensitivities(program, batches(), candidates=CANDIDATES)
    assert gw.Sensitivities.from_json(table.to_json()) == table
    text = str(table)
    for words in ("fisher", "up.weight", "INT4 g16", "INT8 g16", "float", "kurtosis"):
        assert words in text
    for broken in ("{}", "[]", "x", '{"measure": "a", "candidates": [], "linears": [{}]}'):
        with pytest.raises(gw.InputError, match="is no table"):
            gw.Sensitivities.from_json(broken)


def test_the_program_is_left_alone(program: gw.Program) -> None:
    before = str(program)
    gw.sensitivities(program, batches(), measure="loss")
    assert str(program) == before
    assert all(tensor.grad is None for tensor in program.tensors().values())


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"measure": "magic"}, "must be one of 'fisher'"),
        ({"calibration": None}, "needs calibration data"),
        ({"calibration": []}, "no calibration data"),
        ({"calibration": [{"input_ids": torch.zeros(2, 9)}]}, "calibration batch 1 does not fit"),
        ({"calibration": [{"ids": torch.zeros(2, 9)}]}, "calibration batch 1 does not fit"),
        ({"candidates": []}, "list of formats"),
        ({"candidates": [{"bits": 5}]}, "not 5"),
        ({"candidates": [{"bit": 4}]}, "'bit' is no option"),
        ({"candidates": [None, None]}, "occurs twice"),
        ({"loss": 3}, "must be a function"),
        ({"loss": lambda outputs, batch: outputs["logits"]}, "one finite number"),
        ({"loss": lambda outputs, batch: outputs["logits"].sum() * float("nan")}, "one finite number"),
        ({"loss": lambda outputs, batch: torch.zeros(())}, "no gradient flows"),
        ({"labels": "wanted"}, "has no 'wanted'"),
        ({"labels": "wanted", "loss": len}, "two losses"),
        ({"where": "lm_head"}, "no linear that can be quantised"),
        ({"rounding": "best"}, "sensitivities: rounding"),
    ],
)
def test_bad_input(program: gw.Program, options: dict[str, Any], what: str) -> None:
    given = {"calibration": batches(), **options}
    with pytest.raises(gw.InputError, match=what):
        gw.sensitivities(program, **given)


@pytest.mark.parametrize("measure", ["fisher", "output"])
def test_a_method_that_uses_its_inputs_up_leaves_them_to_the_next_candidate(program: gw.Program, measure: str) -> None:
    forms: list[dict[str, Any]] = [{"bits": bits, "group_size": 16} for bits in (4, 3, 8)]
    there, back = (
        gw.sensitivities(program, batches(), candidates=given, measure=measure, rounding="gptq")
        for given in (forms, forms[::-1])
    )
    for row, other in zip(there.linears, back.linears, strict=True):
        assert min(row.values) > 0
        assert row.values == other.values[::-1]


def test_candidates_of_other_dtypes() -> None:
    """A table's codes and zero points between codes: what they lose and take is what the pass gives and stores."""
    linear = torch.nn.Linear(64, 24, bias=False)
    program = gw.trace(linear, torch.randn(2, 64))
    candidates: list[Any] = [
        {"dtype": "nf4", "group_size": 32},
        {"dtype": "fp8_e4m3"},
        {"bits": 3, "group_size": 32, "symmetric": False, "float_zero_points": True},
    ]
    table = gw.sensitivities(program, candidates=candidates, measure="sqnr")
    assert table.names() == ("NF4 g32", "FP8_E4M3 per channel", "INT3 g32 float zero points")
    (row,) = table.linears
    exact = linear.weight.detach()
    for options, value, stored in zip(candidates, row.values, row.stored, strict=True):
        small = gw.trace(linear, torch.randn(2, 64))
        gw.QuantizeLinears(**options)(small)
        tensors = small.tensors()
        assert stored == sum(tensor.nbytes for name, tensor in tensors.items() if name != "weight")
        error = small(torch.eye(64)).T - exact
        assert value == pytest.approx(float(error.square().sum() / exact.square().sum()), rel=1e-3)
    smallest = gw.allocate(table, budget_bytes=min(row.stored))
    assert smallest.overrides["weight"] == candidates[2]
    assert gw.QuantizeLinears(overrides=smallest.overrides)(program)
