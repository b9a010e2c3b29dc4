"""What holds for every kind of adapter after training: saved, merged, taken out, quantised, switched."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.passes.adapters.cases import CASES, Net, X
from tests.passes.adapters.shared import NAMES, close, moved, net, traced

import graphwright as gw


@pytest.mark.parametrize("name", NAMES)
def test_saved_alone_and_put_in_again(name: str, tmp_path: Path) -> None:
    program = moved(name)
    gw.save_adapter(program, tmp_path / "adapter")
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    for source in (tmp_path / "adapter", tmp_path / "adapter" / "adapter_model.safetensors"):
        insert = gw.InsertAdapters(source, adapter_name="again")
        again = gw.optimize(traced(), [insert], example_inputs=X, verify=False)
        assert torch.equal(again(X), program(X))
        assert {n.rpartition(".")[0] for n, p in again.named_parameters() if p.requires_grad} == {
            n.rpartition(".")[0] for n, p in program.named_parameters() if p.requires_grad
        }


@pytest.mark.parametrize("name", NAMES)
def test_a_program_with_one_is_saved_whole(name: str, tmp_path: Path) -> None:
    program = moved(name)
    program.save(tmp_path)
    loaded = gw.Program.load(tmp_path)
    assert loaded.records == program.records
    assert all(torch.equal(loaded.tensor(weight), tensor) for weight, tensor in program.tensors().items())
    assert close(loaded(X), program(X))  # mapped memory is aligned otherwise, so products are summed otherwise
    gw.save_adapter(loaded, tmp_path / "adapter")
    assert gw.RemoveAdapters()(loaded)


@pytest.mark.parametrize("name", NAMES)
def test_taken_out_again_the_base_is_left_bit_for_bit(name: str) -> None:
    bare = gw.optimize(moved(name), [gw.RemoveAdapters()], example_inputs=X, verify=False)
    assert torch.equal(bare(X), net()(X))
    assert set(bare.tensors()) == {weight for weight, _ in net().named_parameters()}
    assert not bare.records


@pytest.mark.parametrize("name", NAMES)
def test_merged_it_is_the_same_function_with_nothing_left_of_it(name: str) -> None:
    program, kind = moved(name), CASES[name].kind
    if kind.unmergeable is not None:
        with pytest.raises(gw.GraphwrightError, match="cannot be merged") as caught:
            gw.optimize(program, [gw.MergeAdapters()], example_inputs=X)
        assert kind.unmergeable in str(caught.value.__cause__ or caught.value)
        return
    merged = gw.optimize(program, [gw.MergeAdapters()], example_inputs=X)
    assert merged.report.rows[0].contract == "exact"
    assert close(merged(X), program(X))
    assert set(merged.records) == {"merged_adapters"}
    assert not any("adapter" in gw.tags_of(node) for node in merged.nodes)
    assert [gw.op_name(node) for node in merged.nodes if node.op == "call_function"] == [
        gw.op_name(node) for node in traced().nodes if node.op == "call_function"
    ]
    for (weight, p), q in zip(net().named_parameters(), Net().parameters(), strict=True):
        assert torch.equal(p, q), weight


@pytest.mark.parametrize("name", NAMES)
def test_quantising_afterwards_leaves_it_alone(name: str) -> None:
    program = moved(name)
    passes = [gw.Cleanup(), gw.QuantizeLinears(bits=8, group_size=16)]
    small = gw.optimize(program, passes, example_inputs=X, verify=False)
    for weight in gw.adapter_tensors(program, "default"):
        assert torch.equal(small.tensor(weight), program.tensor(weight))
    assert close(small(X), program(X), 0.05)
    bare = gw.optimize(small, [gw.RemoveAdapters()], example_inputs=X, verify=False)
    assert bool(bare(X).isfinite().all())


@pytest.mark.parametrize("name", NAMES)
def test_it_is_off_at_0_and_on_at_1(name: str) -> None:
    both = gw.optimize(moved(name), [gw.GateAdapters()], example_inputs=X, verify=False)
    rows = torch.tensor([[1.0], [0], [1], [0], [0], [1], [0]])
    found, on, off = both(X, adapter_weights=rows), moved(name)(X), net()(X)
    for index, weight in enumerate(rows.flatten().tolist()):
        assert close(found[index], (on if weight else off)[index], 3e-6)
