"""Adapters that every row of a batch chooses and mixes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.passes.adapters.cases import Net, X, stirred

import graphwright as gw


def close(found: torch.Tensor, wanted: torch.Tensor, eps: float = 3e-6) -> bool:
    return bool((found - wanted).detach().norm() <= eps * wanted.detach().norm())


def only(name: str, *kinds: tuple[str, gw.AdapterKind]) -> gw.Program:
    """The net with one of several adapters."""
    program = several(*kinds)
    others = tuple(other for other, _ in kinds if other != name)
    return gw.optimize(program, [gw.RemoveAdapters(adapters=others)], example_inputs=X)


def several(*kinds: tuple[str, gw.AdapterKind]) -> gw.Program:
    passes = [gw.InsertAdapters(kind, where="blocks.*", adapter_name=name) for name, kind in kinds]
    return stirred(gw.optimize(Net(), passes, example_inputs=X))


def gated(program: gw.Program, target: str = "reference") -> gw.OptimizedModel:
    return gw.optimize(program, [gw.GateAdapters()], example_inputs=X, target=target)


TWO = (("a", gw.LoRA(rank=4, alpha=8)), ("b", gw.KronA()))


@pytest.mark.parametrize("target", ["reference", "cpu"])
def test_every_row_has_its_own(target: str) -> None:
    program = gated(several(*TWO), target)
    assert program.report.rows[0].contract == "exact"
    rows = ["a", None, "b", "a", "b", {"a": 1.0, "b": 1.0}, None]
    found = program(X, adapter_weights=gw.adapter_weights(program, rows))
    alone = {None: Net(), "a": only("a", *TWO), "b": only("b", *TWO)}
    for index, row in enumerate(rows):
        wanted = several(*TWO)(X) if isinstance(row, dict) else alone[row](X)
        assert close(found[index], wanted[index])


def test_half_of_one_is_half_of_what_it_adds() -> None:
    kind = gw.LoRA(rank=4)
    program = stirred(gw.optimize(Net(), [gw.InsertAdapters(kind, where="out"), gw.GateAdapters()], example_inputs=X))
    none, half, whole = (program(X, adapter_weights=torch.full((7, 1), weight)) for weight in (0.0, 0.5, 1.0))
    assert close(half, (none + whole) / 2)
    assert torch.equal(none, Net()(X))


def test_the_rewrite() -> None:
    program = gw.optimize(Net(), [gw.InsertAdapters(gw.LoRA(rank=2), where="out")], example_inputs=X)
    gw.GateAdapters()(program)
    lines = [line.strip() for line in str(program).splitlines() if "#adapter" in line or "adapter_weights" in line]
    assert sum("aten.mul.Tensor" in line for line in lines) == 1
    assert any("aten.slice.Tensor(%adapter_weights, 1, 0, 1)" in line for line in lines)
    with pytest.raises(gw.InputError, match="'default' are switched by calls already"):
        gw.GateAdapters()(program)


def test_the_input_is_a_keyword_and_is_asked_for() -> None:
    program = gated(several(*TWO))
    assert program.signature.names[-1] == "adapter_weights"
    with pytest.raises(gw.InputError, match="is missing") as caught:
        program(X)
    assert "adapter_weights" in str(caught.value)
    with pytest.raises(gw.InputError, match="has 3 for"):
        program(X, adapter_weights=torch.zeros(3, 2))
    with pytest.raises(gw.InputError, match="dimension 1"):
        program(X, adapter_weights=torch.zeros(7, 3))
    assert torch.equal(program.examples[-1], torch.ones(7, 2))


def test_what_is_wrong_is_said_and_nothing_is_changed() -> None:
    program, bare = several(*TWO), gw.trace(Net(), X)
    for item, which, kind, words in (
        (gw.GateAdapters(), bare, gw.SelectionError, "no adapter to switch"),
        (gw.GateAdapters(adapters=("a", "c")), program, gw.InputError, "there is no adapter 'c'"),
    ):
        before, names = str(which), which.signature.names
        with pytest.raises(kind, match=words):
            item(which)
        assert str(which) == before
        assert which.signature.names == names
    for wrong in ("a", (), ("a", "a")):
        with pytest.raises(gw.InputError, match="adapters"):
            gw.GateAdapters(adapters=wrong)
    with pytest.raises(gw.InputError, match="not switched by calls"):
        gw.adapter_weights(program, ["a"])
    with pytest.raises(gw.InputError, match="no adapter 'c' that calls switch"):
        gw.adapter_weights(gated(program), ["a", "c"])
    with pytest.raises(gw.InputError, match="the weight of 'a' is nan, no finite number"):
        gw.adapter_weights(gated(program), [{"a": float("nan")}])
    with pytest.raises(gw.InputError, match="switched as the program runs"):
        gw.MergeAdapters()(gated(program))


def test_those_left_out_stay_on_and_removed_ones_go() -> None:
    program = several(*TWO)
    one = gw.optimize(program, [gw.GateAdapters(adapters=("b",))], example_inputs=X)
    assert close(one(X, adapter_weights=torch.zeros(7, 1)), only("a", *TWO)(X))
    both = gated(program)
    call = {"x": X, "adapter_weights": torch.ones(7, 2)}
    left = gw.optimize(both, [gw.RemoveAdapters(adapters=("a",))], example_inputs=call)
    assert close(left(X, adapter_weights=torch.ones(7, 2)), only("b", *TWO)(X))


def test_saved_and_loaded(tmp_path: Path) -> None:
    program = gated(several(*TWO))
    program.save(tmp_path / "whole")
    loaded = gw.Program.load(tmp_path / "whole")
    weights = gw.adapter_weights(loaded, ["a", "b", None, None, "a", "a", {"a": 0.25, "b": 0.5}])
    assert close(loaded(X, adapter_weights=weights), program(X, adapter_weights=weights))
    gw.save_adapter(loaded, tmp_path / "a", "a")
    again = gw.optimize(Net(), [gw.InsertAdapters(tmp_path / "a")], example_inputs=X)
    assert close(again(X), only("a", *TWO)(X))


def test_in_onnxruntime(tmp_path: Path) -> None:
    onnxruntime: Any = pytest.importorskip("onnxruntime")
    program = gated(several(("a", gw.LoRA(rank=4, alpha=8)), ("b", gw.LoRA(rank=2))))
    program.export_onnx(tmp_path / "gated.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "gated.onnx")
    names = [each.name for each in session.get_inputs()]
    assert names[-1] == "adapter_weights"
    weights = gw.adapter_weights(program, ["a", None, "b", "a", "b", {"a": 0.5}, None])
    (found,) = session.run(None, {names[0]: X.numpy(), names[1]: weights.numpy()})
    assert close(torch.from_numpy(found), program(X, adapter_weights=weights), 1e-5)
