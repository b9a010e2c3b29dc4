"""SoRA's gates: the proximal step, and ranks deleted with the function kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.passes.adapters.cases import Case, Net, X, inserted, stirred

import graphwright as gw


def gated(rank: int = 4) -> gw.Program:
    return stirred(inserted(Case(gw.SoRA(rank=rank, scale=1.5), 0)))


def gates(program: gw.Program) -> dict[str, torch.Tensor]:
    return {name: t for name, t in gw.adapter_tensors(program, "default").items() if "gate" in name}


def test_the_step_is_the_proximal_operator_of_the_absolute_value() -> None:
    program = gated()
    before = {name: gate.detach().clone() for name, gate in gates(program).items()}
    open_, total = gw.shrink_gates(program, 0.5)
    assert total == 24
    assert open_ == sum(int((gate.abs() > 0.5).sum()) for gate in before.values())
    assert 0 < open_ < total
    for name, gate in gates(program).items():
        wanted = before[name].sign() * (before[name].abs() - 0.5).clamp(min=0)
        assert torch.allclose(gate, wanted, atol=1e-7)
        assert gate.requires_grad


def test_deleted_ranks_leave_the_function(tmp_path: Path) -> None:
    program = gated()
    gw.shrink_gates(program, 0.5)
    with torch.no_grad():
        next(iter(gates(program).values())).zero_()
    open_ = gw.shrink_gates(program, 0.0)[0]
    small = gw.optimize(program, [gw.DeleteRanks()], example_inputs=X)
    assert small.report.rows[0].contract == "exact"
    assert small.report.rows[0].notes["ranks_after"] == open_
    assert torch.allclose(small(X), program(X), atol=2e-6)
    assert sum(g.numel() for g in gates(small).values()) == open_
    assert len(gates(small)) == 5
    assert not gw.DeleteRanks()(small)
    assert set(gw.adapter_tensors(small, "default")) <= set(gw.adapter_tensors(program, "default"))
    gw.save_adapter(small, tmp_path)
    again = gw.optimize(Net(), [gw.InsertAdapters(tmp_path)], example_inputs=X)
    assert torch.allclose(again(X), small(X), atol=2e-6)
    merged = gw.optimize(small, [gw.MergeAdapters()], example_inputs=X)
    assert torch.allclose(merged(X), program(X), atol=5e-6)
    bare = gw.optimize(small, [gw.RemoveAdapters()], example_inputs=X)
    assert torch.equal(bare(X), Net()(X))


def test_all_gates_closed_is_no_adapter() -> None:
    program = gated(2)
    assert gw.shrink_gates(program, 100.0) == (0, 12)
    assert gw.DeleteRanks(adapters=["default"])(program)
    assert not program.records
    assert torch.equal(program(X), Net()(X))


def test_below_another_adapter() -> None:
    program = gated()
    gw.InsertAdapters(gw.LoRA(rank=2), where="blocks.0.q", adapter_name="above")(program)
    gw.InsertAdapters(gw.IA3(), where="blocks.0.q", adapter_name="scaled")(program)
    stirred(program)
    gw.shrink_gates(program, 0.5)
    small = gw.optimize(program, [gw.DeleteRanks()], example_inputs=X)
    assert torch.allclose(small(X), program(X), atol=2e-6)


def test_what_has_no_gates() -> None:
    program = inserted(Case(gw.LoRA(rank=2), 0))
    with pytest.raises(gw.InputError, match="is lora, which has no gates"):
        gw.shrink_gates(program, 0.1)
    with pytest.raises(gw.InputError, match="is lora, which has no gates"):
        gw.DeleteRanks(adapters=("default",))(program)
    assert not gw.DeleteRanks()(program)
    with pytest.raises(gw.InputError, match="0 or more"):
        gw.shrink_gates(gated(), -1.0)
