"""Pruned students: their zeros hold as they learn, and whatever comes before or after."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.passes.adapters.models import traced
from tests.passes.distillation.test_distill import batches, shaken
from tests.passes.removal.oracle import reduced

import graphwright as gw

pytest.importorskip("transformers")


def test_zeros_hold_through_training_and_quantisation() -> None:
    dense, data = traced("llama"), batches("llama")
    example = data[0]
    student = gw.optimize(dense, [gw.PruneLinears(sparsity=0.75), gw.HoldMasks()], example_inputs=example)
    gone = {name: tensor == 0 for name, tensor in student.tensors().items() if name.endswith("proj.weight")}
    assert len(gone) == 21
    assert all(0.7 < float(mask.float().mean()) < 0.8 for mask in gone.values())
    found = gw.distill(
        student,
        dense,
        data,
        loss=[gw.TaskLoss(), gw.SquareHead()],
        steps=12,
        optimizer=lambda p: torch.optim.AdamW(p, 0.003, weight_decay=0.1),
    )
    errors = [step["SquareHead"] for step in found.losses]
    assert sum(errors[-3:]) < 0.9 * sum(errors[:3])
    for name, mask in gone.items():
        assert bool((student.tensor(name)[mask] == 0).all()), name
        assert bool((student.tensor(name) != traced("llama").tensor(name))[~mask].any()), name
    small = gw.optimize(student, [gw.ReleaseMasks(), gw.QuantizeLinears(bits=8, group_size=16)], example_inputs=example)
    assert "graphwright.apply_mask" not in {gw.op_name(node) for node in small.nodes}
    with torch.no_grad():
        assert (small(**example).logits - student(**example).logits).norm() < 0.05 * student(**example).logits.norm()


@pytest.mark.parametrize("held", [False, True], ids=["released", "held"])
def test_structure_is_removed_from_pruned_programs(held: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    data: dict[str, Any] = batches("llama")[0]
    program = shaken("llama")
    passes: list[gw.Pass] = [gw.PruneLinears(sparsity=0.5), *([gw.HoldMasks()] if held else [])]
    pruned = gw.optimize(program, passes, example_inputs=data, verify=False)
    for item in (gw.RemoveHeads(fraction=0.5), gw.RemoveChannels(fraction=0.3)):
        small, zeroed = reduced(pruned, item, monkeypatch)
        with torch.no_grad():
            found, wanted = small(**data).logits, zeroed(**data).logits
        assert (found - wanted).norm() <= 1e-6 * wanted.norm()
    masks = {name: tensor for name, tensor in small.tensors().items() if tensor.dtype == torch.bool}
    assert bool(masks) == held
    assert all(small.tensor(name.removesuffix("_mask")).shape == mask.shape for name, mask in masks.items())
