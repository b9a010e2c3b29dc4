"""What people get wrong with adapters: it is said, and program and base weights are bit for bit as they were."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.passes.adapters.cases import Net, X, stirred
from torch import nn

import graphwright as gw
from graphwright.passes.adapters.base import Dense

LORA = gw.LoRA(rank=4, alpha=8)


class Wider(nn.Module):
    """Another model with layers of the same names, one of them wider."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.Module()
        block.q = nn.Linear(24, 30)
        self.blocks = nn.ModuleList([block])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.blocks[0].q(x)  # type: ignore[operator]
        return y


def refused(program: gw.Program, action: Callable[[gw.Program], Any], kind: type[Exception]) -> str:
    """What is said when it fails; nothing may have changed by then."""
    text, records, journal = str(program), json.dumps(program.records), list(program.journal)
    names, values = list(program.tensors()), {name: tensor.clone() for name, tensor in program.tensors().items()}
    identities = dict(program.tensors())
    with pytest.raises(kind) as caught:
        action(program)
    assert str(program) == text
    assert json.dumps(program.records) == records
    assert program.journal == journal
    assert list(program.tensors()) == names
    for name, tensor in program.tensors().items():
        assert tensor is identities[name]
        assert torch.equal(tensor, values[name])
        assert tensor.requires_grad == identities[name].requires_grad
    return str(caught.value)


def traced() -> gw.Program:
    return gw.trace(Net(), X)


def adapted() -> gw.Program:
    return stirred(gw.optimize(Net(), [gw.InsertAdapters(LORA, where="blocks.*")], example_inputs=X))


INSERTIONS: dict[str, tuple[Callable[[], gw.Pass], type[Exception], tuple[str, ...]]] = {
    "a target that matches nothing": (
        lambda: gw.InsertAdapters("lora", where="layers.*.query"),
        gw.SelectionError,
        ("layers.*.query",),
    ),
    "targets that are no layers": (
        lambda: gw.InsertAdapters("lora", where=lambda node: gw.op_name(node) == "aten.relu"),
        gw.SelectionError,
        ("there is no place for lora",),
    ),
    "a rank above the dimension": (
        lambda: gw.InsertAdapters(gw.LoRA(rank=25), where="blocks.*"),
        gw.InputError,
        ("rank 25 is above the smaller side of its weight [24, 24]", "blocks.0.q", "rank=24 or less"),
    ),
    "a Kronecker shape that does not divide": (
        lambda: gw.InsertAdapters(gw.KronA((5, 4)), where="blocks.*"),
        gw.InputError,
        ("a=(5, 4) does not divide the weight [24, 24]", "blocks.0.q", "the nearest that does is a=("),
    ),
    "a folder that is not there": (
        lambda: gw.InsertAdapters("adapters/missing"),
        gw.InputError,
        ("there is no such file or folder",),
    ),
}


@pytest.mark.parametrize("case", INSERTIONS)
def test_an_adapter_that_cannot_go_in(case: str) -> None:
    make, kind, words = INSERTIONS[case]
    said = refused(traced(), lambda program: make()(program), kind)
    for part in words:
        assert part in said


def test_the_model_too_is_as_it_was() -> None:
    model = Net()
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(gw.InputError):
        gw.optimize(model, [gw.InsertAdapters(gw.LoRA(rank=25))], example_inputs=X)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
        assert p.requires_grad


def test_two_of_one_name() -> None:
    said = refused(adapted(), lambda program: gw.InsertAdapters("krona", where="blocks.*")(program), gw.InputError)
    assert "there is an adapter 'default' already" in said
    assert "adapter_name=" in said


def test_an_adapter_of_another_model(tmp_path: Path) -> None:
    gw.save_adapter(adapted(), tmp_path)
    wider = gw.trace(Wider(), X)
    said = refused(wider, lambda program: gw.InsertAdapters(tmp_path)(program), gw.InputError)
    assert "was saved from 'Net' and does not fit 'Wider': 6 of 6 places differ" in said
    assert "blocks.1.q: the program has no such layer" in said
    assert "blocks.0.q: saved for {'op': 'linear', 'features': [24, 24]}" in said


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def garble(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[8:40] = b"x" * 32
    file.write_bytes(bytes(data))


def empty(file: Path) -> None:
    file.write_bytes(b"")


def of_the_future(file: Path) -> None:
    data = file.read_bytes()
    assert data.count(b'\\"version\\": 1') == 1
    file.write_bytes(data.replace(b'\\"version\\": 1', b'\\"version\\": 9'))


def remove(file: Path) -> None:
    file.unlink()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut, "truncated or damaged"),
        (garble, "truncated or damaged"),
        (empty, "truncated or damaged"),
        (of_the_future, "version 9, this graphwright reads 1"),
        (remove, "there is no"),
    ],
)
def test_damaged_files(tmp_path: Path, damage: Callable[[Path], None], words: str) -> None:
    gw.save_adapter(adapted(), tmp_path)
    damage(tmp_path / "adapter_model.safetensors")
    said = refused(traced(), lambda program: gw.InsertAdapters(tmp_path)(program), gw.GraphwrightError)
    assert words in said
    assert str(tmp_path) in said


def test_no_adapter_of_that_name() -> None:
    for action in (
        gw.MergeAdapters(adapters=("other",)),
        gw.RemoveAdapters(adapters=("other",)),
        lambda program: gw.save_adapter(program, "nowhere", "other"),
    ):
        said = refused(adapted(), action, gw.InputError)
        assert "there is no adapter 'other'" in said
        assert "'default'" in said


def test_merging_twice_and_training_what_is_merged() -> None:
    merged = gw.optimize(adapted(), [gw.MergeAdapters()], example_inputs=X)
    for action in (gw.MergeAdapters(), gw.MergeAdapters(adapters=("default",)), gw.adapter_parameters):
        said = refused(merged, action, gw.InputError)
        assert "adapter 'default' has been merged: it is part of the weights" in said
        assert "UnmergeAdapters" in said


def transposed(kind: gw.LoRA, site: Any, dense: Dense, factors: dict[str, torch.Tensor]) -> Dense:
    change = kind.scale * factors["lora_B"] @ factors["lora_A"]
    return Dense(dense.weight + (change.t() if change.shape[0] == change.shape[1] else change), dense.bias)


def scaled_twice(kind: gw.LoRA, site: Any, dense: Dense, factors: dict[str, torch.Tensor]) -> Dense:
    return Dense(dense.weight + kind.scale**2 * factors["lora_B"] @ factors["lora_A"], dense.bias)


def subtracted(kind: gw.LoRA, site: Any, dense: Dense, factors: dict[str, torch.Tensor]) -> Dense:
    return Dense(dense.weight - kind.scale * factors["lora_B"] @ factors["lora_A"], dense.bias)


def without_the_last_rank(kind: gw.LoRA, site: Any, dense: Dense, factors: dict[str, torch.Tensor]) -> Dense:
    return Dense(dense.weight + kind.scale * factors["lora_B"][:, :-1] @ factors["lora_A"][:-1], dense.bias)


def into_the_bias_too(kind: gw.LoRA, site: Any, dense: Dense, factors: dict[str, torch.Tensor]) -> Dense:
    change = kind.scale * factors["lora_B"] @ factors["lora_A"]
    bias = None if dense.bias is None else dense.bias + 1e-4 * change.sum(1)
    return Dense(dense.weight + change, bias)


@pytest.mark.parametrize(
    "wrong", [transposed, scaled_twice, subtracted, without_the_last_rank, into_the_bias_too], ids=lambda f: f.__name__
)
def test_a_wrong_merge_is_caught_and_undone(monkeypatch: pytest.MonkeyPatch, wrong: Any) -> None:
    program = adapted()
    values = {name: tensor.clone() for name, tensor in program.tensors().items()}
    monkeypatch.setattr(gw.LoRA, "merged", wrong)
    with pytest.raises(gw.ContractViolation, match="'merge-adapters' promises exact"):
        gw.optimize(program, [gw.MergeAdapters()], example_inputs=X)
    assert all(torch.equal(program.tensor(name), tensor) for name, tensor in values.items())
    assert list(gw.adapters_of(program)) == ["default"]
