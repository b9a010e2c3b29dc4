"""Merged adapters taken out of the weights again."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from tests.passes.adapters.cases import CASES, Net, X, inserted, stirred
from tests.passes.adapters.shared import moved, net
from torch import nn

import graphwright as gw

LORA = CASES["lora"]
MERGEABLE = sorted(name for name, case in CASES.items() if case.kind.unmergeable is None)


def close(found: torch.Tensor, wanted: torch.Tensor, eps: float = 2e-6) -> bool:
    return bool((found - wanted).norm() <= eps * wanted.norm())


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def run(program: gw.Program, *passes: gw.Pass) -> gw.OptimizedModel:
    return gw.optimize(program, passes, example_inputs=X)


@pytest.mark.parametrize("name", MERGEABLE)
def test_the_base_comes_back_bit_for_bit_and_the_adapter_beside_it(name: str) -> None:
    program = moved(name)
    merged = gw.optimize(program, [gw.MergeAdapters()], example_inputs=X, verify=False)
    apart = run(merged, gw.UnmergeAdapters())
    assert not apart.kept
    assert apart.records == program.records
    assert set(apart.tensors()) == set(program.tensors())
    for weight, tensor in program.tensors().items():
        assert torch.equal(apart.tensor(weight), tensor), weight
        assert apart.tensor(weight).requires_grad == tensor.requires_grad
    assert torch.equal(apart(X), program(X))
    assert not gw.UnmergeAdapters()(apart)
    assert gw.RemoveAdapters()(apart)
    assert torch.equal(apart(X), net()(X))


def test_base_weights_in_memory_are_shared_not_copied() -> None:
    model = Net()
    merged = run(inserted(LORA, model), gw.MergeAdapters())
    bare = run(merged, gw.UnmergeAdapters(beside=False))
    assert bare.report.rows[0].contract == "retrain"
    assert not bare.records
    for name, parameter in model.named_parameters():
        assert bare.tensor(name).data_ptr() == parameter.data_ptr()


def test_two_are_taken_out_last_first() -> None:
    program = stirred(run(inserted(LORA), gw.InsertAdapters(gw.KronA(), where="blocks.*", adapter_name="second")))
    merged = run(program, gw.MergeAdapters(adapters=("default",)), gw.MergeAdapters(adapters=("second",)))
    assert close(merged(X), program(X))
    with pytest.raises(gw.InputError, match="'second' was merged into the same weights after 'default'") as caught:
        gw.UnmergeAdapters(adapters=("default",))(merged)
    assert "take both out" in str(caught.value)
    one = run(merged, gw.UnmergeAdapters(adapters=("second",)))
    assert list(gw.adapters_of(one)) == ["second"]
    assert close(one(X), program(X))
    both = run(merged, gw.UnmergeAdapters())
    assert list(gw.adapters_of(both)) == ["default", "second"]
    assert close(both(X), program(X))
    for name, tensor in program.tensors().items():
        assert torch.equal(both.tensor(name), tensor)
    with pytest.raises(gw.InputError, match="'second' is not merged, it lies beside"):
        gw.UnmergeAdapters(adapters=("second",))(one)


def test_the_one_on_top_waits_for_the_one_below() -> None:
    program = run(inserted(LORA), gw.InsertAdapters("lora", where="blocks.*", adapter_name="second"))
    before = str(program)
    with pytest.raises(gw.InputError, match="'second' lies on another one") as caught:
        gw.MergeAdapters(adapters=("second",))(program)
    assert "in the order" in str(caught.value)
    assert str(program) == before


def saved_and_loaded(tmp_path: Path, model: nn.Module | None = None, **options: object) -> gw.Program:
    program = stirred(inserted(LORA, model))
    gw.save_adapter(program, tmp_path / "adapter")
    run(program, gw.MergeAdapters()).save(tmp_path / "merged")
    gw.trace(model or Net(), X).save(tmp_path / "base")
    return gw.Program.load(tmp_path / "merged")


def test_after_a_load_the_base_and_the_adapter_are_read_and_known_by_digest(tmp_path: Path) -> None:
    loaded = saved_and_loaded(tmp_path)
    program = stirred(inserted(LORA))
    for base in (tmp_path / "base", Net(), gw.trace(Net(), X)):
        item = gw.UnmergeAdapters(base=base, adapter=tmp_path / "adapter")
        apart = run(loaded, item)
        for name, tensor in program.tensors().items():
            assert torch.equal(apart.tensor(name), tensor)
    assert apart.report.rows[0].options == {"base": "Program", "adapter": str(tmp_path / "adapter")}
    bare = run(loaded, gw.UnmergeAdapters(base=Net(), beside=False))
    assert torch.equal(bare(X), Net()(X))


def test_after_a_load_what_is_missing_is_named(tmp_path: Path) -> None:
    loaded = saved_and_loaded(tmp_path)
    before = bits(loaded)
    other = Net()
    with torch.no_grad():
        other.get_parameter("blocks.1.down.weight")[0, 0] += 1
    stirred(inserted(LORA), seed=1)
    gw.save_adapter(stirred(inserted(LORA), seed=1), tmp_path / "another")
    adapter = tmp_path / "adapter"
    for item, words in (
        (gw.UnmergeAdapters(), "the tensors of adapter 'default' are not in memory"),
        (gw.UnmergeAdapters(beside=False), "weight 'blocks.0.q.weight'.*is missing: it is not in memory|is missing"),
        (gw.UnmergeAdapters(adapter=adapter), "is missing: it is not in memory"),
        (gw.UnmergeAdapters(adapter=adapter, base=nn.ReLU()), "the ReLU given as base has no weight of that"),
        (gw.UnmergeAdapters(adapter=adapter, base=other), "the Net given as base has other values for it"),
        (gw.UnmergeAdapters(adapter=adapter, base=tmp_path), "holds no safetensors file"),
        (gw.UnmergeAdapters(adapter=adapter, base=tmp_path / "nowhere"), "there is no such folder"),
        (gw.UnmergeAdapters(adapter=tmp_path / "another", base=Net()), "is not the adapter that was merged"),
    ):
        with pytest.raises(gw.InputError, match=words):
            item(loaded)
        assert set(loaded.records) == {"merged_adapters"}
        assert all(torch.equal(loaded.tensor(name), tensor) for name, tensor in before.items())


def test_a_weight_changed_since_is_not_overwritten() -> None:
    merged = run(inserted(LORA), gw.MergeAdapters())
    fused = run(merged, gw.QuantizeLinears(bits=8, group_size=16))
    with pytest.raises(gw.InputError, match="is no longer there; since then ran quantize-linears"):
        gw.UnmergeAdapters()(fused)
    with torch.no_grad():
        merged.tensor("blocks.0.q.weight").add_(1)
    changed = bits(merged)
    merged.kept.clear()
    with pytest.raises(gw.InputError, match="is not what the merge made of it any more"):
        gw.UnmergeAdapters(beside=False, base=Net())(merged)
    assert all(torch.equal(merged.tensor(name), tensor) for name, tensor in changed.items())


def test_what_is_merged_is_merged_once_and_has_no_tensors(tmp_path: Path) -> None:
    merged = run(stirred(inserted(LORA)), gw.MergeAdapters())
    before = bits(merged)
    for action in (
        gw.MergeAdapters(),
        gw.MergeAdapters(adapters=("default",)),
        gw.RemoveAdapters(),
        gw.RemoveAdapters(adapters=("default",)),
        lambda program: gw.save_adapter(program, tmp_path / "adapter"),
        lambda program: gw.adapter_tensors(program, "default"),
    ):
        with pytest.raises(gw.InputError, match="adapter 'default' has been merged") as caught:
            action(merged)
        assert "UnmergeAdapters" in str(caught.value)
    with pytest.raises(gw.InputError, match="the weights have taken in an adapter 'default' already"):
        gw.InsertAdapters("lora")(merged)
    assert not (tmp_path / "adapter").exists()
    assert all(torch.equal(merged.tensor(name), tensor) for name, tensor in before.items())


def test_training_a_merged_adapter_is_refused() -> None:
    program = inserted(LORA)
    assert [name for name, _ in gw.adapter_parameters(program)] == sorted(gw.adapter_tensors(program, "default"))
    merged = run(program, gw.MergeAdapters())
    with pytest.raises(gw.InputError, match="adapter 'default' has been merged"):
        gw.adapter_parameters(merged)
    with pytest.raises(gw.InputError, match="there is no adapter to train"):
        gw.adapter_parameters(gw.trace(Net(), X))


def test_nothing_need_be_kept() -> None:
    model = Net()
    program = stirred(inserted(LORA, model))
    merged = run(program, gw.MergeAdapters(keep=False))
    assert not merged.kept
    with pytest.raises(gw.InputError, match="not in memory"):
        gw.UnmergeAdapters()(merged)
    assert torch.equal(run(merged, gw.UnmergeAdapters(base=model, beside=False))(X), model(X))


def test_copies_and_states_carry_what_is_kept() -> None:
    program = run(stirred(inserted(LORA)), gw.MergeAdapters())
    for each in (program.clone(), program.clone(copy_weights=True), copy.deepcopy(program)):
        assert gw.UnmergeAdapters()(each)
        assert torch.equal(each.tensor("blocks.0.q.weight"), Net().get_parameter("blocks.0.q.weight"))
    state = program.snapshot()
    gw.UnmergeAdapters()(program)
    program.restore(state)
    assert gw.UnmergeAdapters()(program)


def test_a_failed_merge_leaves_everything() -> None:
    program = run(inserted(LORA), gw.InsertAdapters("krona", where="blocks.*", adapter_name="second"))
    tensor = program.tensor("blocks.1.up.krona_A.second")
    with torch.no_grad():
        tensor.fill_(float("nan"))
    before = str(program)
    base = bits(program)
    with pytest.raises((gw.InputError, gw.ContractViolation)):
        gw.optimize(program, [gw.MergeAdapters(adapters=("default", "nobody"))], example_inputs=X)
    assert str(program) == before
    assert not program.kept
    for name, value in base.items():
        assert torch.equal(program.tensor(name), value) or name == "blocks.1.up.krona_A.second"
