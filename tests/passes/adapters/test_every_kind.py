"""What holds for every kind of adapter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.passes.adapters.cases import CASES, Case, Net, X, inserted, stirred

import graphwright as gw

NAMES = sorted(CASES)


def close(found: torch.Tensor, wanted: torch.Tensor, eps: float = 2e-6) -> bool:
    return bool((found - wanted).norm() <= eps * wanted.norm())


@pytest.fixture(params=NAMES)
def case(request: pytest.FixtureRequest) -> Case:
    found: Case = CASES[request.param]
    return found


def test_what_trains_is_the_adapter_and_as_many_numbers_as_published(case: Case) -> None:
    program = inserted(case)
    trained = {name: p for name, p in program.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trained.values()) == case.trained
    assert set(trained) <= set(gw.adapter_tensors(program, "default"))
    assert program.report.rows[0].notes["trained_parameters"] == case.trained


def test_the_model_is_left_as_it_was(case: Case) -> None:
    model = Net()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    program = stirred(inserted(case, model))
    program(X).sum().backward()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
        assert p.requires_grad
        assert p.grad is None


def test_a_new_one_changes_nothing_where_it_says_so(case: Case) -> None:
    model = Net()
    program = inserted(case, model)
    kind = program.report.rows[0].contract
    assert kind == ("exact" if case.kind.starts_as_identity() else "retrain")
    if case.kind.starts_as_identity():
        assert close(program(X), model(X))
    assert not close(stirred(program)(X), model(X), 1e-3)


def test_it_trains(case: Case) -> None:
    program, wanted = inserted(case), torch.randn(7, 5)
    optimizer = torch.optim.Adam([p for p in program.parameters() if p.requires_grad], 0.01)
    losses = []
    for _ in range(30):
        loss = (program(X) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.98 * losses[0]
    assert all(p.grad is not None for p in program.parameters() if p.requires_grad)


def test_saved_alone_and_put_in_again(case: Case, tmp_path: Path) -> None:
    model = Net()
    program = stirred(inserted(case, model))
    gw.save_adapter(program, tmp_path / "adapter")
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    for source in (tmp_path / "adapter", tmp_path / "adapter" / "adapter_model.safetensors"):
        again = gw.optimize(model, [gw.InsertAdapters(source, adapter_name="again")], example_inputs=X)
        assert torch.equal(again(X), program(X))
        assert {n.rpartition(".")[0] for n, p in again.named_parameters() if p.requires_grad} == {
            n.rpartition(".")[0] for n, p in program.named_parameters() if p.requires_grad
        }


def test_a_program_with_one_is_saved_whole(case: Case, tmp_path: Path) -> None:
    program = stirred(inserted(case))
    program.save(tmp_path)
    loaded = gw.Program.load(tmp_path)
    assert loaded.records == program.records
    assert all(torch.equal(loaded.tensor(name), tensor) for name, tensor in program.tensors().items())
    assert close(loaded(X), program(X))  # mapped memory is aligned otherwise, so products are summed otherwise
    gw.save_adapter(loaded, tmp_path / "adapter")
    assert gw.RemoveAdapters()(loaded)


def test_taken_out_again_the_base_is_left_bit_for_bit(case: Case) -> None:
    model = Net()
    program = stirred(inserted(case, model))
    bare = gw.optimize(program, [gw.RemoveAdapters()], example_inputs=X)
    assert torch.equal(bare(X), model(X))
    assert set(bare.tensors()) == {name for name, _ in model.named_parameters()}
    assert not bare.records


def test_merged_it_is_the_same_function_with_nothing_left_of_it(case: Case) -> None:
    model = Net()
    program = stirred(inserted(case, model))
    if case.kind.unmergeable is not None:
        with pytest.raises(gw.GraphwrightError, match="cannot be merged") as caught:
            gw.optimize(program, [gw.MergeAdapters()], example_inputs=X)
        assert case.kind.unmergeable in str(caught.value.__cause__ or caught.value)
        return
    merged = gw.optimize(program, [gw.MergeAdapters()], example_inputs=X)
    assert close(merged(X), program(X))
    assert set(merged.records) == {"merged_adapters"}
    assert not any("adapter" in gw.tags_of(node) for node in merged.nodes)
    bare = gw.trace(model, X)
    assert [gw.op_name(node) for node in merged.nodes if node.op == "call_function"] == [
        gw.op_name(node) for node in bare.nodes if node.op == "call_function"
    ]
    for (name, p), q in zip(model.named_parameters(), Net().parameters(), strict=True):
        assert torch.equal(p, q), name


def test_two_of_one_name_are_refused(case: Case) -> None:
    program = inserted(case)
    before = str(program)
    with pytest.raises(gw.InputError, match="there is an adapter 'default' already"):
        gw.InsertAdapters(case.kind, where=case.where)(program)
    assert str(program) == before


@pytest.mark.parametrize("bits", [4, 8])
def test_beside_packed_weights(case: Case, bits: int) -> None:
    """The base is quantised before, gradients flow through it; merging is refused with what to do."""
    passes = [
        gw.QuantizeLinears(bits=bits, group_size=16),
        gw.InsertAdapters(case.kind, where=case.where, **case.options),
    ]
    if case.dense:
        with pytest.raises(gw.InputError, match="packed|floating point"):
            gw.optimize(Net(), passes, example_inputs=X)
        return
    program = gw.optimize(Net(), passes, example_inputs=X)
    program(X).square().sum().backward()
    grads = [p.grad for p in program.parameters() if p.requires_grad]
    assert grads
    assert all(grad is not None and bool(torch.isfinite(grad).all()) for grad in grads)
    if case.kind.unmergeable is None:
        with pytest.raises(gw.InputError, match="packed"):
            gw.MergeAdapters()(program)


def test_quantising_afterwards_leaves_it_alone(case: Case) -> None:
    program = stirred(inserted(case))
    small = gw.optimize(program, [gw.Cleanup(), gw.QuantizeLinears(bits=8, group_size=16)], example_inputs=X)
    for name in gw.adapter_tensors(program, "default"):
        assert torch.equal(small.tensor(name), program.tensor(name))
    assert close(small(X), program(X), 0.05)
    assert torch.equal(
        gw.optimize(small, [gw.RemoveAdapters()], example_inputs=X)(X).isfinite(), torch.ones(7, 5).bool()
    )
