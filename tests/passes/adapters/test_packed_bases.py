"""Adapters merged into packed weights: not unasked, and then measured."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.passes.adapters.cases import Net, X, stirred

import graphwright as gw
from graphwright.ir.arguments import argument

FORMS: dict[str, dict[str, Any]] = {
    "graphwright.linear_nbits": {"bits": 4, "group_size": 16, "symmetric": False},
    "graphwright.linear_nbits 3 bits": {"bits": 3, "group_size": 16},
    "graphwright.linear_codebook": {"dtype": "nf4", "group_size": 16},
    "graphwright.linear_nbits_dynamic": {"bits": 4, "group_size": 16, "activations": "int8"},
    "graphwright.linear_nbits_dynamic 8 bits": {"bits": 8, "group_size": 16, "activations": "int8"},
    "graphwright.linear_fp8_dynamic": {"dtype": "fp8_e4m3", "group_size": 16, "activations": "fp8"},
    "graphwright.linear_int8_dynamic": {"bits": 8, "activations": "int8"},
    "graphwright.linear_int8_static": {
        "bits": 8,
        "activations": "int8",
        "activation_ranges": "static",
        "calibration": [torch.randn(64, 24, generator=torch.Generator().manual_seed(1))],
    },
}


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).detach().norm() / wanted.detach().norm())


def adapted(model: torch.nn.Module, **options: Any) -> gw.OptimizedModel:
    """A packed base with an adapter that matters."""
    passes = [gw.QuantizeLinears(ignore="out", **options), gw.InsertAdapters(gw.LoRA(rank=4), where="blocks.*")]
    program = gw.optimize(model, passes, example_inputs=X)
    with torch.no_grad():
        for _, parameter in gw.adapter_parameters(program):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    return program


@pytest.mark.parametrize("op", sorted(FORMS))
def test_rounded_again_in_the_same_format_with_the_error_measured(op: str) -> None:
    program = adapted(Net(), **FORMS[op])
    before = {name: tensor.clone() for name, tensor in program.tensors().items()}
    merged = gw.optimize(program, [gw.MergeAdapters(requantize=True)], example_inputs=X)
    row = merged.report.rows[0]
    assert row.contract == "approximate"
    packed = [node for node in merged.nodes if gw.op_name(node) == op.partition(" ")[0]]
    assert len(packed) == 6
    assert not any("adapter" in gw.tags_of(node) for node in merged.nodes)
    for name, tensor in merged.tensors().items():
        assert (tensor.dtype, tensor.shape) == (before[name].dtype, before[name].shape)
    bare = gw.optimize(program, [gw.RemoveAdapters()], example_inputs=X)
    error = relative(merged(X), program(X))
    assert error < 0.5 * relative(bare(X), program(X))  # most of what it does has survived
    measured = row.notes["weights"]
    assert len(measured) == 6
    assert all(0 < entry["relative"] < 0.25 for entry in measured.values())
    assert all(entry["of_adapter"] > 0 for entry in measured.values())
    with pytest.raises(gw.InputError, match="merged into packed weights") as caught:
        gw.UnmergeAdapters()(merged)
    assert "rounded=True" in str(caught.value)
    apart = gw.optimize(merged, [gw.UnmergeAdapters(rounded=True)], example_inputs=X)
    assert all(torch.equal(apart.tensor(name), tensor) for name, tensor in before.items())
    assert torch.equal(apart(X), program(X))


def test_what_is_measured_is_what_is_lost() -> None:
    program = adapted(Net(), bits=4, group_size=16)
    linear = next(node for node in program.nodes if gw.op_name(node) == "graphwright.linear_nbits")
    args = argument(linear, "qweight"), argument(linear, "scales")

    def dense(which: gw.Program) -> torch.Tensor:
        operator = torch.ops.graphwright.linear_nbits
        found: torch.Tensor = operator(torch.eye(24), *(which.tensor(node) for node in args), None, None, 4, 16)
        return found.t()

    merged = gw.optimize(program, [gw.MergeAdapters(requantize=True)], example_inputs=X)
    name = str(args[0].target).removesuffix("qweight")
    change = program.tensor(f"{name}lora_B.default") @ program.tensor(f"{name}lora_A.default")
    lost = dense(merged) - dense(program) - change
    noted = merged.report.rows[0].notes["weights"][str(args[0].target)]
    assert noted["of_adapter"] == pytest.approx(float(lost.norm() / change.norm()), rel=1e-4)
    assert noted["relative"] == pytest.approx(float(lost.norm() / (dense(program) + change).norm()), rel=1e-4)


def test_float_layers_among_them_are_merged_exactly() -> None:
    program = gw.optimize(
        Net(),
        [gw.QuantizeLinears(where="blocks.0.*", bits=4, group_size=16), gw.InsertAdapters("lora", where="blocks.*")],
        example_inputs=X,
    )
    merged = gw.optimize(program, [gw.MergeAdapters(requantize=True)], example_inputs=X)
    assert len(merged.report.rows[0].notes["weights"]) == 3


def test_after_quantising_it_must_be_asked_for_before_anything_runs() -> None:
    ran: list[str] = []

    class Watch(gw.Hook):
        def before_pass(self, program: gw.Program, item: gw.Pass) -> None:
            ran.append(item.name)

    insert, quantize = gw.InsertAdapters("lora", where="blocks.*"), gw.QuantizeLinears(bits=8)
    with pytest.raises(gw.OrderError, match="'merge-adapters' cannot run after 'quantize-linears'") as caught:
        gw.optimize(Net(), [insert, quantize, gw.MergeAdapters()], example_inputs=X, hooks=[Watch()])
    text = str(caught.value)
    assert "requantize=True" in text
    assert "an order that works: insert-adapters, merge-adapters, quantize-linears" in text
    assert not ran
    gw.optimize(Net(), [insert, quantize, gw.MergeAdapters(requantize=True)], example_inputs=X)
    gw.optimize(Net(), [insert, gw.MergeAdapters(), quantize], example_inputs=X)
    program = adapted(Net(), bits=8)
    state = str(program)
    with pytest.raises(gw.GraphwrightError, match="requantize=True"):  # by the weights it meets, not by its history
        gw.optimize(program, [gw.MergeAdapters()], example_inputs=X)
    with pytest.raises(gw.InputError, match="the weight is packed") as refused:
        gw.MergeAdapters()(program)
    assert "requantize=True" in str(refused.value)
    assert str(program) == state


def test_weights_that_quantisation_left_alone_are_merged_into() -> None:
    passes = [gw.InsertAdapters(gw.LoRA(rank=3), where="blocks.*"), gw.QuantizeLinears(bits=8, where="out")]
    program = stirred(gw.optimize(Net(), passes, example_inputs=X))
    merged = gw.optimize(program, [gw.MergeAdapters()], example_inputs=X)
    assert merged.report.rows[0].contract == "exact"
    assert not any("adapter" in gw.tags_of(node) for node in merged.nodes)
