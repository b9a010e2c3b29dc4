"""What holds for every kind of adapter: what it trains, that it leaves the model alone, and that it learns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.passes.adapters.cases import CASES, Net, X
from tests.passes.adapters.shared import NAMES, close, fresh, moved, net, packed, put_in

import graphwright as gw


@pytest.mark.parametrize("name", NAMES)
def test_what_trains_is_the_adapter_and_as_many_numbers_as_published(name: str) -> None:
    program = fresh(name)
    trained = {weight: p for weight, p in program.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trained.values()) == CASES[name].trained
    assert set(trained) <= set(gw.adapter_tensors(program, "default"))
    assert program.report.rows[0].notes["trained_parameters"] == CASES[name].trained


@pytest.mark.parametrize("name", NAMES)
def test_the_model_is_left_as_it_was(name: str) -> None:
    program = put_in(CASES[name])
    program(X).sum().backward()
    assert all(p.grad is not None for p in program.parameters() if p.requires_grad)
    for (weight, p), q in zip(net().named_parameters(), Net().parameters(), strict=True):
        assert torch.equal(p, q), weight
        assert p.requires_grad
        assert p.grad is None


@pytest.mark.parametrize("name", NAMES)
def test_a_new_one_changes_nothing_where_it_says_so(name: str) -> None:
    program, kind = fresh(name), CASES[name].kind
    assert program.report.rows[0].contract == ("exact" if kind.starts_as_identity() else "retrain")
    if kind.starts_as_identity():
        assert close(program(X), net()(X))
    assert not close(moved(name)(X), net()(X), 1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_it_trains(name: str) -> None:
    program, wanted = put_in(CASES[name]), torch.randn(7, 5)
    optimizer = torch.optim.Adam([p for p in program.parameters() if p.requires_grad], 0.01)
    losses = []
    for _ in range(30):
        loss = (program(X) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    # Every kind has as many numbers as the 35 targets here, or reaches the head's input: thirty steps of Adam move
    # each number by up to 0.3. A kind whose gradients are wrong in sign or place does not get below its start.
    assert losses[-1] < 0.98 * losses[0]
    assert all(p.grad is not None for p in program.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", NAMES)
def test_two_of_one_name_are_refused(name: str) -> None:
    program, case = fresh(name), CASES[name]
    before = str(program)
    with pytest.raises(gw.InputError, match="there is an adapter 'default' already"):
        gw.InsertAdapters(case.kind, where=case.where)(program)
    assert str(program) == before


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bits", [4, 8])
def test_beside_packed_weights(name: str, bits: int) -> None:
    """The base is quantised before, gradients flow through it; merging is refused with what to do."""
    case = CASES[name]
    if case.dense:
        with pytest.raises(gw.InputError, match="packed|floating point"):
            put_in(case, packed(bits))
        return
    program: Any = put_in(case, packed(bits))
    program(X).square().sum().backward()
    grads = [p.grad for p in program.parameters() if p.requires_grad]
    assert grads
    assert all(grad is not None and bool(torch.isfinite(grad).all()) for grad in grads)
    if case.kind.unmergeable is None:
        with pytest.raises(gw.InputError, match="packed"):
            gw.MergeAdapters()(program)
