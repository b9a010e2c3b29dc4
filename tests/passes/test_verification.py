"""The parts of verification: comparison, sampling, float64 evaluation, the cut-point check."""

from __future__ import annotations

import math

import pytest
import torch
from tests.passes.conftest import DropDropout, Stack
from torch import nn

import graphwright as gw
from graphwright.passes.verification import precise
from graphwright.passes.verification.comparison import compare, compare_logits
from graphwright.passes.verification.local import check_locally
from graphwright.passes.verification.sampling import sample, small_sizes, vocabulary

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("value", "reference"),
    [
        ([1.0, NAN], [1.0, 2.0]),
        ([1.0, 2.0], [1.0, NAN]),
        ([1.0, INF], [1.0, 2.0]),
        ([1.0, INF], [1.0, -INF]),
        ([1.0, NAN], [1.0, INF]),
        ([1e-30, 0.0], [0.0, 0.0]),
    ],
)
def test_unlike_values_are_infinitely_far(value: list[float], reference: list[float]) -> None:
    assert compare(torch.tensor(value), torch.tensor(reference)).worst == INF


def test_equal_non_finite_values_compare_by_the_finite_ones() -> None:
    assert compare(torch.tensor([1.0, NAN, INF]), torch.tensor([1.0, NAN, INF])).worst == 0.0
    moved = compare(torch.tensor([1.1, NAN]), torch.tensor([1.0, NAN]))
    assert moved.worst == pytest.approx(0.1, rel=1e-5)


@pytest.mark.parametrize(
    ("value", "reference", "reason"),
    [
        (torch.zeros(2), torch.zeros(3), "shape"),
        (torch.zeros(2), torch.zeros(2, dtype=torch.int64), "dtype"),
        (torch.tensor([1, 2]), torch.tensor([1, 3]), "1 of 2 elements"),
        ((torch.zeros(1),), (torch.zeros(1), torch.zeros(1)), "number of results"),
        (3, 4, "instead of"),
        (3, 3.0, "instead of"),
    ],
)
def test_reasons(value: object, reference: object, reason: str) -> None:
    assert reason in compare(value, reference).reason


def test_one_wrong_element_is_not_hidden_by_many_right_ones() -> None:
    reference = torch.randn(1000, 1000)
    value = reference.clone()
    value[500, 500] += 1.0
    assert compare(value, reference).worst == pytest.approx(1.0, rel=0.01)


def test_relative_error_cosine_and_sqnr_agree_with_their_formulas() -> None:
    reference, noise = torch.randn(400, dtype=torch.float64), torch.randn(400, dtype=torch.float64) * 0.1
    found = compare(reference + noise, reference)
    relative = float(noise.norm() / reference.norm())
    assert found.relative == pytest.approx(relative)
    assert found.sqnr_db == pytest.approx(-20 * math.log10(relative))
    assert found.cosine == pytest.approx(float(torch.cosine_similarity(reference + noise, reference, dim=0)))


def test_logits_are_compared_as_distributions() -> None:
    logits = torch.randn(3, 5, 11)
    assert compare_logits(logits, logits) == {"kl": 0.0, "top1_agreement": 1.0}
    shifted = compare_logits(logits + 4.0, logits)
    assert shifted["kl"] == pytest.approx(0.0, abs=1e-12)
    other = compare_logits(-logits, logits)
    assert other["kl"] > 0.1
    assert other["top1_agreement"] < 0.5


@pytest.fixture
def program(stack: Stack, batch: dict[str, torch.Tensor]) -> gw.Program:
    return gw.trace(stack, batch)


def test_samples_fit_the_program(program: gw.Program, batch: dict[str, torch.Tensor]) -> None:
    examples = program.signature.flatten((), batch)
    ids, mask = program.inputs
    assert vocabulary(program, ids) == 50
    assert vocabulary(program, mask) is None
    generator = torch.Generator().manual_seed(0)
    seen: set[int] = set()
    for variant in range(3):
        sizes = small_sizes(program, variant)
        drawn = sample(program, examples, sizes, generator)
        assert drawn[0].shape == (sizes["batch"], sizes["sequence"])
        assert int(drawn[0].max()) < 50
        lengths = drawn[1].sum(1)
        assert int(lengths.min()) >= 1
        assert torch.equal(drawn[1], (torch.arange(sizes["sequence"]) < lengths[:, None]).long())
        seen.update(drawn[0].flatten().tolist())
        program(*drawn)
    assert len(seen) > 20


def test_float64_run_matches_a_float64_model(stack: Stack, batch: dict[str, torch.Tensor]) -> None:
    program = gw.trace(stack, batch)
    values = precise.run(program, program.signature.flatten((), batch))
    exact = stack.double()(**batch)
    names = [item.name for item in program.output.args[0]]
    assert values[names[0]].dtype == torch.float64
    assert float((values[names[0]] - exact["hidden"]).abs().max()) < 1e-14


def test_float64_run_slices_large_linears(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(8, 37).eval()
    x = torch.randn(3, 8)
    program = gw.trace(model, x)
    monkeypatch.setattr(precise, "_SLICE_ELEMENTS", 40)
    value = precise.run(program, [x])[program.output.args[0][0].name]
    assert torch.allclose(value, model.double()(x.double()), rtol=0, atol=1e-14)


def test_unchanged_regions_are_not_computed_again(program: gw.Program, batch: dict[str, torch.Tensor]) -> None:
    flat = program.signature.flatten((), batch)
    before, values = program.snapshot(), precise.run(program, flat)
    assert check_locally(before, values, program).nodes == []
    DropDropout(where="layers.1")(program)
    result = check_locally(before, values, program)
    # The users of the dropout read the same old value under another name: nothing is computed, one claim is compared.
    assert [(item.stands_for, item.difference.worst) for item in result.nodes] == [("dropout_1", 0.0)]
    with program.edit() as rewriter:
        relu = next(node for node in program.nodes if gw.op_name(node) == "aten.relu")
        rewriter.replace(relu, rewriter.call("aten.gelu", relu.args[0], like=relu))
    found = [item for item in check_locally(before, values, program).nodes if item.difference.worst > 0]
    assert [item.stands_for for item in found] == [relu.name]
    assert found[0].difference.worst > 0.01
