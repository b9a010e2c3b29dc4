"""The pipeline runs passes, holds them to their contracts, rolls back what fails, and reports what it did."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from tests.passes.conftest import DropDropout, ScaleLinears, Stack
from torch import nn

import graphwright as gw

Batch = dict[str, torch.Tensor]


def test_optimize_returns_the_original_output_type_and_reports(stack: Stack, batch: Batch) -> None:
    expected = stack(**batch)
    small = gw.optimize(stack, [DropDropout()], example_inputs=batch)
    result = small(**batch)
    assert list(result) == ["hidden", "logits"]
    for name in expected:
        assert torch.equal(result[name], expected[name])
    row = small.report.rows[0]
    assert row.changed
    assert row.local_error == 0.0
    assert row.outputs["hidden"]["original"]["worst"] == 0.0
    assert "drop-dropout" in str(small.report)
    assert json.loads(small.report.to_json())["rows"][0]["name"] == "drop-dropout"
    page = small.report.to_html()
    assert page.startswith("<!doctype html>")
    assert "http" not in page.lower().replace("http-equiv", "")


def test_second_run_changes_nothing(stack: Stack, batch: Batch) -> None:
    program = gw.trace(stack, batch)
    assert DropDropout()(program)
    assert not DropDropout()(program)
    report = gw.run_passes(program, [DropDropout()])
    assert not report.rows[0].changed


def test_model_passed_in_is_left_as_it_was(stack: Stack, batch: Batch) -> None:
    stack.train()
    before = {name: tensor.clone() for name, tensor in stack.state_dict().items()}
    gw.optimize(stack, [DropDropout(), ScaleLinears()], example_inputs=batch)
    assert stack.training
    assert all(torch.equal(before[name], tensor) for name, tensor in stack.state_dict().items())


def test_approximate_pass_is_measured_against_the_original(stack: Stack, batch: Batch) -> None:
    small = gw.optimize(stack, [ScaleLinears(factor=1.01)], example_inputs=batch)
    entry = small.report.rows[0].outputs["logits"]["original"]
    with torch.no_grad():
        expected, got = stack(**batch)["logits"], small(**batch)["logits"]
    relative = float((got - expected).norm() / expected.norm())
    assert entry["relative"] >= relative * 0.99
    assert small.report.rows[0].worst_output_error() is not None
    worst = small.report.rows[0].notes["worst_values"][0]
    assert worst["relative"] == pytest.approx(0.01, rel=0.2)


def test_budget_stops_the_pipeline_and_rolls_back(stack: Stack, batch: Batch) -> None:
    program = gw.trace(stack, batch)
    flat = program.signature.flatten((), batch)
    text = str(program)
    with pytest.raises(gw.ContractViolation, match="scale-linears.*budget") as caught:
        gw.run_passes(program, [ScaleLinears(factor=1.05, max_error=0.001)], [gw.Verifier(flat)])
    assert caught.value.pass_name == "scale-linears"
    assert str(program) == text
    assert torch.equal(program(**batch)["logits"], stack(**batch)["logits"])


def test_local_limit_catches_a_wrong_layer_by_name(stack: Stack, batch: Batch) -> None:
    with pytest.raises(gw.ContractViolation, match="layers.1.up"):
        gw.optimize(stack, [ScaleLinears(factor=1.5, where="layers.1.up")], example_inputs=batch)


def test_passes_before_the_failing_one_stay_done(stack: Stack, batch: Batch) -> None:
    program = gw.trace(stack, batch)
    flat = program.signature.flatten((), batch)
    with pytest.raises(gw.ContractViolation):
        gw.run_passes(program, [DropDropout(), ScaleLinears(factor=3.0)], [gw.Verifier(flat)])
    assert [entry.pass_name for entry in program.journal] == ["drop-dropout"]
    assert "aten.dropout" not in str(program)


@dataclass(frozen=True, kw_only=True)
class Misbehaving(gw.Pass):
    """Does the wrong thing its ``how`` names."""

    name: ClassVar[str] = "misbehaving"
    how: str = ""

    def run(self, program: gw.Program) -> bool:
        linear = next(node for node in program.nodes if gw.op_name(node) == "aten.linear")
        if self.how == "raise":
            raise RuntimeError("boom")
        if self.how == "raise-in-edit":
            with program.edit() as rewriter:
                rewriter.replace(linear, rewriter.call("aten.relu", linear, like=linear))
                raise RuntimeError("boom")
        if self.how == "in-place":
            with torch.no_grad():
                program.tensor(linear.args[1]).mul_(1.0)
            return True
        if self.how == "lie":
            with program.edit() as rewriter:
                rewriter.call("aten.relu", linear, like=linear)
            return False
        if self.how == "behind-the-back":
            linear.args = (linear.args[0], linear.args[1])
            program.body.recompile()
            return True
        if self.how == "not-equal-shape":
            with program.edit() as rewriter:
                rewriter.replace(linear, rewriter.call("aten.t", linear.args[1], like=linear))
        return False


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("raise", gw.PassError, "boom"),
        ("raise-in-edit", gw.PassError, "boom"),
        ("in-place", gw.ContractViolation, "wrote into the weight 'layers.0.up.weight'"),
        ("lie", gw.ContractViolation, "says it changed nothing"),
        ("behind-the-back", gw.ContractViolation, "does not compute what"),
        ("not-equal-shape", gw.PassError, "replaced value"),
    ],
)
def test_misbehaving_passes_are_named_and_undone(
    stack: Stack, batch: Batch, how: str, error: type[Exception], message: str
) -> None:
    program = gw.trace(stack, batch)
    flat = program.signature.flatten((), batch)
    text, expected = str(program), program(**batch)["logits"]
    with pytest.raises(error, match=message) as caught:
        gw.run_passes(program, [Misbehaving(how=how)], [gw.Verifier(flat)])
    assert "misbehaving" in str(caught.value)
    assert str(program) == text
    assert torch.equal(program(**batch)["logits"], expected)


def test_program_in_is_not_changed(stack: Stack, batch: Batch) -> None:
    program = gw.trace(stack, batch)
    text = str(program)
    gw.optimize(program, [DropDropout()], example_inputs=batch)
    assert str(program) == text
    assert not program.journal


def test_nested_pipelines_run_as_one_list(stack: Stack, batch: Batch) -> None:
    inner = gw.Pipeline(passes=(DropDropout(),))
    small = gw.optimize(stack, [gw.Pipeline(passes=(inner, ScaleLinears(factor=1.001)))], example_inputs=batch)
    assert [row.name for row in small.report.rows] == ["drop-dropout", "scale-linears"]


def test_fixed_point_pipeline_counts_as_one_pass(stack: Stack, batch: Batch) -> None:
    small = gw.optimize(stack, [gw.Pipeline(passes=(DropDropout(),), fixed_point=True)], example_inputs=batch)
    assert [row.name for row in small.report.rows] == ["pipeline"]
    assert small.report.rows[0].notes["changed_by"] == {"drop-dropout": 1}


def test_dump_ir_writes_every_step(stack: Stack, batch: Batch, tmp_path: Path) -> None:
    gw.optimize(stack, [DropDropout(), DropDropout()], example_inputs=batch, hooks=[gw.DumpIR(tmp_path / "ir")])
    assert sorted(path.name for path in (tmp_path / "ir").iterdir()) == ["00-start.txt", "01-drop-dropout.txt"]


def test_bisect_finds_the_first_bad_pass(stack: Stack, batch: Batch) -> None:
    program = gw.trace(stack, batch)
    expected = stack(**batch)["logits"]

    def is_good(candidate: gw.Program) -> bool:
        return bool((candidate(**batch)["logits"] - expected).abs().max() < 1e-3 * expected.abs().max())

    passes = [DropDropout(), ScaleLinears(factor=1.0), ScaleLinears(factor=1.2, where="head"), ScaleLinears(factor=1.0)]
    culprit = gw.bisect(program, passes, is_good)
    assert culprit is not None
    assert culprit.index == 2
    assert gw.bisect(program, passes[:2], is_good) is None
    assert not program.journal


def test_bisect_names_a_pass_that_raises(stack: Stack, batch: Batch) -> None:
    culprit = gw.bisect(gw.trace(stack, batch), [DropDropout(), Misbehaving(how="raise")], lambda program: True)
    assert culprit is not None
    assert culprit.item.name == "misbehaving"
    assert "boom" in str(culprit)


def test_bisect_refuses_a_bad_start(stack: Stack, batch: Batch) -> None:
    with pytest.raises(gw.InputError, match="not good before any pass"):
        gw.bisect(gw.trace(stack, batch), [DropDropout()], lambda program: False)


def test_nan_and_infinity_never_pass_for_equal(stack: Stack, batch: Batch) -> None:
    with pytest.raises(gw.ContractViolation):
        gw.optimize(stack, [ScaleLinears(factor=float("nan"))], example_inputs=batch)
    with pytest.raises(gw.ContractViolation):
        gw.optimize(stack, [ScaleLinears(factor=float("inf"))], example_inputs=batch)


def test_verification_can_be_switched_off(stack: Stack, batch: Batch) -> None:
    small = gw.optimize(stack, [ScaleLinears(factor=9.0)], example_inputs=batch, verify=False)
    assert small.report.rows[0].worst_output_error() is None
    assert "not verified" in str(small.report)


def test_optimized_model_trains(stack: Stack, batch: Batch) -> None:
    small = gw.optimize(stack, [DropDropout()], example_inputs=batch)
    names = dict(small.named_parameters())
    assert names.keys() == dict(stack.named_parameters()).keys()
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(small(**batch)["logits"], torch.tensor([1, 2]))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": "quantum"}, "no target 'quantum'"),
        ({"passes": ["cleanup"]}, "'cleanup' is not a pass"),
        ({"passes": [DropDropout]}, "DropDropout is a class"),
        ({"example_inputs": None}, "needed to trace"),
        ({"example_inputs": {"wrong": torch.zeros(2, 2)}}, "does not take these example inputs"),
        ({"example_inputs": 3}, "must be a mapping"),
    ],
)
def test_bad_arguments_are_explained(stack: Stack, batch: Batch, arguments: dict[str, object], message: str) -> None:
    options: dict[str, object] = {"passes": [], "example_inputs": batch, **arguments}
    passes = options.pop("passes")
    with pytest.raises(gw.InputError, match=message):
        gw.optimize(stack, passes, **options)


def test_max_error_is_only_for_approximate_passes() -> None:
    with pytest.raises(gw.InputError, match="only for approximate"):
        DropDropout(max_error=0.1)
    with pytest.raises(gw.InputError, match="positive"):
        ScaleLinears(max_error=-1.0)
