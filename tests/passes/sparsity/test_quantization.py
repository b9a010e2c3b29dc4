"""Sparsify, then quantise: what was pruned is exactly 0 in packed weights, with every rounding and format."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import graphwright as gw
from graphwright.passes.calibration import Observed
from graphwright.passes.quantization.formats import Format
from graphwright.passes.quantization.rounding.descent import dense
from graphwright.passes.quantization.rounding.gptq import gptq
from graphwright.passes.sparsity.description import packed_values

from .models import batches, decoder, ids, pruned, sparse_gpt

FORMATS: dict[str, dict[str, Any]] = {
    "int8": {},
    "int4": {"bits": 4, "group_size": 16},
    "int4 asymmetric": {"bits": 4, "group_size": 16, "symmetric": False},
    "int3": {"bits": 3, "group_size": 32, "symmetric": False},
    "int2": {"bits": 2, "group_size": 16, "symmetric": False, "clip_search": False},
    "even range": {"bits": 4, "group_size": 16, "clip_search": False, "even_range": True},
    "nf4": {"dtype": "nf4", "group_size": 32},
    "fp4": {"dtype": "fp4", "group_size": 32},
    "fp8": {"dtype": "fp8_e4m3", "group_size": 32},
    "block": {"bits": 4, "block": (16, 16)},
    "int8 activations": {"activations": "int8"},
}
ROUNDINGS: dict[str, Any] = {
    "nearest": "nearest",
    "gptq": "gptq",
    "gptq by importance": gw.Gptq(act_order=True),
    "gptq static": gw.Gptq(act_order=True, static_groups=True),
    "gptq sweeps": gw.Gptq(sweeps=2),
    "gptq short blocks": gw.Gptq(block=8),
    "hqq": "hqq",
    "hqq with scales": gw.Hqq(fit_scale=True),
    "awq-clip": "awq-clip",
}


def packed(program: gw.Program) -> dict[str, torch.Tensor]:
    """Values of the packed weights, by module path."""
    return {
        gw.path_of(node): packed_values(program, node)
        for node in program.nodes
        if gw.op_name(node).startswith("graphwright.linear_")
    }


def check(program: gw.Program, before: gw.Program, pattern: str) -> None:
    found = packed(program)
    assert len(found) == 12
    for path, values in found.items():
        weight = before.tensor(f"{path}.weight")
        assert bool((values[weight == 0] == 0).all())
        assert bool((values != 0).any())
    entries = gw.pruned_weights(program)
    assert set(entries) == {f"{path}.qweight" for path in found}
    assert {entry.pattern for entry in entries.values()} == {pattern}
    assert all(row.intact for row in gw.describe_sparsity(program).linears if row.pattern)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_every_format_keeps_zeros(form: str, rounding: str) -> None:
    program = pruned(pattern="2:4")
    before = program.clone()
    assert gw.QuantizeLinears(rounding=rounding, calibration=batches(6), **FORMATS[form])(program)
    check(program, before, "2:4")


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_rounding_keeps_zeros(rounding: str, symmetric: bool) -> None:
    program = pruned(sparsity=0.6)
    before = program.clone()
    data = batches(6)
    item = gw.QuantizeLinears(
        bits=4, group_size=16, symmetric=symmetric, rounding=ROUNDINGS[rounding], calibration=data
    )
    assert item(program)
    check(program, before, "unstructured")


@pytest.mark.parametrize("start", ["nearest", "gptq"])
def test_trained_rounding_keeps_zeros(start: str) -> None:
    program = pruned(sparsity=0.6)
    before = program.clone()
    method = gw.AutoRound(steps=3, start=start, learning_rate=0.5)
    assert gw.QuantizeLinears(bits=4, group_size=16, rounding=method, calibration=batches(6))(program)
    check(program, before, "unstructured")


def test_branches_beside_pruned_weights_leave_their_zeros() -> None:
    for compensation in (gw.LowRank(rank=2), gw.LoftQ(rank=2)):
        program = pruned(sparsity=0.6)
        before = program.clone()
        data = batches(6)
        gw.QuantizeLinears(bits=4, group_size=16, calibration=data, compensation=compensation)(program)
        check(program, before, "unstructured")


def test_gptq_around_zeros_is_better_than_nearest() -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(500, 24, generator=generator) @ torch.randn(24, 64, generator=generator)
    x += 0.5 * torch.randn(500, 64, generator=generator)
    weight = torch.randn(48, 64, generator=generator)
    weight[torch.rand(48, 64, generator=generator) < 0.5] = 0
    moment = Observed.over([x]).moment
    form = Format(4, 32, False, True, keep_zeros=True)

    def error(values: torch.Tensor) -> float:
        return float((x @ (weight - values).T).norm() / (x @ weight.T).norm())

    for options in (gw.Gptq(), gw.Gptq(sweeps=2), gw.Gptq(act_order=True)):
        found = gptq(weight, moment, form, options=options)
        values = dense(found, form)
        assert bool((values[weight == 0] == 0).all())
        assert found.loss.relative == pytest.approx(error(values), rel=2e-2)
        scales, zeros = form.fit(weight.view(48, 2, 32))
        nearest = form.values(form.round(weight.view(48, 2, 32), scales, zeros), scales, zeros).view(48, 64)
        assert error(values) < 0.9 * error(nearest)
    free = dense(gptq(weight, moment, Format(4, 32, False, True)), Format(4, 32, False, True))
    assert bool((free[weight == 0] != 0).any())  # which is why formats say so


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4x1"])
def test_pruning_and_rounding_at_once(pattern: str) -> None:
    program = decoder()
    sparsity = 0.0 if pattern == "2:4" else 0.5
    method = gw.Gptq(sparsity=sparsity, pattern=pattern)
    small = gw.optimize(
        program,
        [gw.QuantizeLinears(bits=4, group_size=16, rounding=method, calibration=batches(6))],
        example_inputs=ids(),
    )
    kind = gw.SparsityPattern.of(pattern, where="test")
    for values in packed(small).values():
        assert float((values == 0).double().mean()) >= 0.5
        if kind.among:
            assert kind.holds(values != 0)
    entries = gw.pruned_weights(small)
    assert {entry.pattern for entry in entries.values()} == {pattern}
    assert len(entries) == 12
    assert any("masked" in gw.tags_of(node) for node in small.nodes)


def test_at_once_loses_little_more_than_pruning_alone() -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(500, 24, generator=generator) @ torch.randn(24, 64, generator=generator)
    x += 0.5 * torch.randn(500, 64, generator=generator)
    weight, moment = torch.randn(48, 64, generator=generator), Observed.over([x]).moment
    alone = sparse_gpt(weight, moment, 0.5, among=4)
    form = Format(8, 32, True, False)
    both = dense(gptq(weight, moment, form, options=gw.Gptq(pattern="2:4")), form)
    assert gw.SparsityPattern.of("2:4", where="test").holds(both != 0)
    errors = [float((x @ (weight - each.float()).T).norm() / (x @ weight.T).norm()) for each in (alone, both)]
    assert errors[1] < 1.02 * errors[0]


def test_zero_points_between_codes_have_no_zero() -> None:
    item = gw.QuantizeLinears(bits=4, group_size=16, symmetric=False, float_zero_points=True)
    found = {refusal.reason for refusal in item.refusals(pruned())}
    assert any("zero points between codes (float_zero_points=True) none stands for 0" in reason for reason in found)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sparsity": 1.0}, "at least 0 and below 1"),
        ({"sparsity": 0.3, "pattern": "2:4"}, "2:4 has 0.5"),
        ({"sparsity": 0.5, "act_order": True}, "goes with columns as they are stored"),
        ({"pattern": "x"}, "is no pattern of zeros"),
    ],
)
def test_options_that_do_not_serve(options: dict[str, Any], words: str) -> None:
    with pytest.raises(gw.InputError, match=words):
        gw.Gptq(**options)


def test_groups_and_patterns_that_do_not_go_together() -> None:
    item = gw.QuantizeLinears(bits=4, group_size=16, rounding=gw.Gptq(pattern="16:32"), calibration=batches(6))
    with pytest.raises(gw.InputError, match="groups of 16 columns are no multiple of 32"):
        item(decoder())
