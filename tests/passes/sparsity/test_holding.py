"""Masks stay masks: while a program trains, is saved, loaded, fused, merged into and transformed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graphwright as gw
from graphwright.ir import ops
from graphwright.ir.pruned import mask_digest

from .models import WORDS, batches, decoder, ids, names, pruned

Listing = Callable[[gw.Program], list[str]]
UP = "layers.0.up.weight"


def masks(program: gw.Program) -> dict[str, torch.Tensor]:
    return {name: program.tensor(name).detach() != 0 for name in names(program)}


def intact(program: gw.Program) -> bool:
    rows = [row for row in gw.describe_sparsity(program).linears if row.pattern is not None]
    return bool(rows) and all(row.intact for row in rows)


def test_text_before_and_after(listing: Listing) -> None:
    program = pruned(where="layers.0.up")
    assert not gw.ReleaseMasks()(program)
    before = listing(program)
    assert gw.HoldMasks()(program)
    (held,) = [line for line in listing(program) if "= graphwright.apply_mask" in line]
    assert held == "%apply_mask = graphwright.apply_mask(%layers_0_up_weight, %layers_0_up_weight_mask)"
    (linear,) = [line for line in listing(program) if "%apply_mask, " in line and "aten.linear" in line]
    assert "%layers_0_up_bias" in linear
    assert program.tensor("layers.0.up.weight_mask").dtype == torch.bool
    assert not gw.HoldMasks()(program)
    assert gw.ReleaseMasks()(program)
    assert listing(program) == before
    assert not gw.ReleaseMasks()(program)


def test_holding_and_releasing_are_exact() -> None:
    program = pruned()
    bare = program.clone()
    small = gw.optimize(program, [gw.HoldMasks()], example_inputs=ids())
    assert small.report.rows[0].contract == "exact"
    assert torch.equal(small(**ids())["logits"], bare(**ids())["logits"])
    assert gw.describe_sparsity(small).linears[0].held
    again = gw.optimize(small, [gw.ReleaseMasks()], example_inputs=ids())
    assert torch.equal(again(**ids())["logits"], bare(**ids())["logits"])
    assert intact(again)


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
        lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    ],
    ids=["sgd", "adamw", "amsgrad"],
)
def test_masked_weights_are_zero_through_training_saving_loading_and_merging(optimizer: Any, tmp_path: Path) -> None:
    program = pruned(sparsity=0.6).clone(copy_weights=True)
    wanted = masks(program)
    gw.HoldMasks()(program)
    train(program, optimizer, seeds=3)
    for name, mask in wanted.items():
        weight = program.tensor(name).detach()
        assert bool((weight[~mask] == 0).all())  # the parameter itself, not only what the linear reads
        assert not torch.equal(weight, pruned(sparsity=0.6).tensor(name))
    program.save(tmp_path / "held")
    loaded = gw.Program.load(tmp_path / "held")
    assert torch.equal(loaded(**ids())["logits"], program(**ids())["logits"])
    train(loaded, optimizer, seeds=1)
    assert gw.ReleaseMasks()(loaded)
    for name, mask in wanted.items():
        assert torch.equal(loaded.tensor(name) != 0, mask)
    assert intact(loaded)
    gw.InsertAdapters(gw.LoRA(rank=2), where="*.up")(loaded)
    with torch.no_grad():
        for each in gw.adapter_tensors(loaded, "default").values():
            each.normal_(generator=torch.Generator().manual_seed(each.numel()))
    gw.MergeAdapters(keep_mask=True)(loaded)
    for name, mask in wanted.items():
        assert bool((loaded.tensor(name)[~mask] == 0).all())
    assert not torch.equal(loaded.tensor(UP), program.tensor(UP))
    assert intact(loaded)


def train(program: gw.Program, optimizer: Any, seeds: int) -> None:
    chosen = optimizer([each for each in program.parameters() if each.requires_grad])
    for seed in range(seeds):
        tokens = ids(seed)["input_ids"]
        logits = program(input_ids=tokens)["logits"]
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        assert float(loss.detach()) < 3 * torch.log(torch.tensor(float(WORDS)))
        chosen.zero_grad()
        loss.backward()
        chosen.step()


def test_an_optimiser_with_a_momentum_from_before_cannot_fill_zeros() -> None:
    program = decoder().clone(copy_weights=True)
    weights = list(program.parameters())
    chosen = torch.optim.SGD(weights, lr=0.1, momentum=0.9)
    train(program, lambda _: chosen, seeds=2)
    gw.PruneLinears()(program)
    for name, each in zip(dict(program.named_parameters()), weights, strict=True):
        with torch.no_grad():
            each.copy_(program.tensor(name))
        program.set_tensor(name, each)  # the objects that the optimiser knows
    wanted = masks(program)
    gw.HoldMasks()(program)
    train(program, lambda _: chosen, seeds=1)
    moved = [name for name, mask in wanted.items() if bool((program.tensor(name)[~mask] != 0).any())]
    assert moved  # by the momentum
    logits = program(**ids())["logits"]
    assert gw.ReleaseMasks()(program)
    assert torch.equal(program(**ids())["logits"], logits)
    for name, mask in wanted.items():
        assert bool((program.tensor(name)[~mask] == 0).all())


def test_a_weight_that_diverged_is_not_let_go_of() -> None:
    program = pruned().clone(copy_weights=True)
    gw.HoldMasks()(program)
    with torch.no_grad():
        program.tensor(UP)[program.tensor(f"{UP}_mask")] = torch.nan
    with pytest.raises(gw.InputError, match="holds NaN or infinity"):
        gw.ReleaseMasks()(program)


def test_held_masks_keep_other_passes_away() -> None:
    program = pruned()
    gw.HoldMasks()(program)
    with pytest.raises(gw.InputError, match="the weight's mask is held for training"):
        gw.PruneLinears(sparsity=0.8)(program)
    item = gw.QuantizeLinears()
    found = {refusal.reason for refusal in item.refusals(program)}
    assert any("its mask is held: ReleaseMasks lets go of it" in reason for reason in found)


# -- the operator ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [0, 1, 2, 3, 7, 8, 9, 17])
def test_apply_mask(dtype: torch.dtype, size: int) -> None:
    op = ops.get("apply_mask").target
    weight = torch.randn(3, size, dtype=dtype)
    mask = torch.rand(3, size) > 0.5
    weight[~mask] = torch.nan
    weight.requires_grad_()
    value = op(weight, mask)
    assert torch.equal(value, torch.where(mask, weight, torch.zeros((), dtype=dtype)))
    value.sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, mask.to(dtype))


def test_apply_mask_refuses_other_shapes_and_dtypes() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    op = ops.get("apply_mask").target
    with FakeTensorMode(), pytest.raises(RuntimeError, match=r"the mask is \[3, 4\], the weight \[3, 5\]"):
        op(torch.empty(3, 5), torch.empty(3, 4, dtype=torch.bool))
    with FakeTensorMode(), pytest.raises(RuntimeError, match="the mask must be bool"):
        op(torch.empty(3, 5), torch.empty(3, 5))


# -- other passes ------------------------------------------------------------------------------------------------------


def test_fusion_takes_masks_along() -> None:
    program = pruned(pattern="2:4")
    parts = [program.tensor(f"layers.0.attn.{name}_proj.weight") for name in "qkv"]
    assert gw.FuseAttention()(program) or True
    assert gw.FuseQKV()(program)
    entry = gw.pruned_weights(program)["layers.0.attn.qkv_proj.weight"]
    assert (entry.pattern, entry.sparsity) == ("2:4", 0.5)
    assert entry.digest == mask_digest(torch.cat(parts) != 0)
    assert not any("q_proj.weight" in name for name in program.records["sparsity"])
    assert intact(program)
    partly = pruned(where="*.q_proj")
    item = gw.FuseQKV()
    assert "the linears carry different tags" in {refusal.reason for refusal in item.refusals(partly)}


def test_a_merge_would_fill_zeros() -> None:
    program = pruned(where="*.up")
    gw.InsertAdapters(gw.LoRA(rank=2), where=["layers.0.up", "layers.0.down"])(program)
    with torch.no_grad():
        for each in gw.adapter_tensors(program, "default").values():
            each.fill_(0.05)
    with pytest.raises(gw.InputError, match="the weight was pruned, and merging would fill its zeros") as error:
        gw.MergeAdapters()(program)
    assert "MergeAdapters(keep_mask=True)" in str(error.value)
    whole = program.clone()
    merged = gw.optimize(program, [gw.MergeAdapters(keep_mask=True)], example_inputs=ids())
    row = merged.report.rows[0]
    assert row.contract == "approximate"
    assert row.notes["dropped_of_adapter"][UP] == pytest.approx(0.5**0.5, abs=0.05)
    assert list(row.notes["dropped_of_adapter"]) == [UP]
    assert torch.equal(merged.tensor(UP) != 0, whole.tensor(UP) != 0)
    assert float((merged.tensor("layers.0.down.weight") == 0).sum()) == 0
    gw.UnmergeAdapters()(merged)
    assert torch.equal(merged.tensor(UP), whole.tensor(UP))


def test_scaling_keeps_masks_and_mixing_columns_is_refused() -> None:
    program = pruned(pattern="2:4")
    wanted = masks(program)
    assert gw.SmoothActivations(calibration=batches(2))(program)
    assert all(torch.equal(mask, masks(program)[name]) for name, mask in wanted.items())
    assert intact(program)
    program = pruned()
    item = gw.RotateHiddenStates()
    found = {refusal.reason for refusal in item.refusals(program)}
    assert any("tagged masked" in reason for reason in found)
    assert not item(program)
    with pytest.raises(gw.OrderError, match="'prune-linears' must come after 'rotate-hidden-states'"):
        gw.optimize(decoder(), [gw.PruneLinears(), item], example_inputs=ids())


def test_training_with_rounding_is_refused() -> None:
    item = gw.InsertFakeQuantize()
    assert {refusal.reason for refusal in item.refusals(pruned(where="*.up"))} >= {
        "it is tagged masked, which this pass leaves alone"
    }
    with pytest.raises(gw.OrderError, match="'prune-linears' cannot run after 'insert-fake-quantize'"):
        gw.optimize(decoder(), [gw.InsertFakeQuantize(), gw.PruneLinears()], example_inputs=ids())


def test_the_description_tells_what_has_changed() -> None:
    program = pruned(sparsity=0.5)
    shown = gw.describe_sparsity(program)
    assert len(shown.linears) == 13
    assert shown.sparsity == pytest.approx(0.5 * 12288 / (12288 + 32 * WORDS) * (1 + 4096 / 12288) / (4 / 3), rel=0.2)
    assert "layers.0.up.weight" in str(shown)
    assert "intact" in str(shown)
    head = next(row for row in shown.linears if row.weight == "lm_head.weight")
    assert (head.sparsity, head.pattern, head.intact, head.held) == (0.0, None, None, False)
    program.set_tensor(UP, nn.Parameter(torch.ones_like(program.tensor(UP))))
    row = next(row for row in gw.describe_sparsity(program).linears if row.weight == UP)
    assert row.intact is False
    assert "CHANGED" in str(gw.describe_sparsity(program))


def test_records_are_saved(tmp_path: Path) -> None:
    program = pruned(pattern="4x1")
    program.save(tmp_path / "program")
    loaded = gw.Program.load(tmp_path / "program")
    assert gw.pruned_weights(loaded) == gw.pruned_weights(program)
    assert intact(loaded)
    assert {gw.path_of(node) for node in loaded.nodes if "masked" in gw.tags_of(node)} == {
        gw.path_of(node) for node in program.nodes if "masked" in gw.tags_of(node)
    }
