"""Runs that are killed and started again: the same result to the last bit, and no mixing of runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import graphwright as gw
from graphwright.ir.errors import SerializationError
from graphwright.passes.quantization import results as results_module
from graphwright.passes.quantization.activations import StaticGrid
from graphwright.passes.quantization.checkpoint import Checkpoint
from graphwright.passes.quantization.formats import Format
from graphwright.passes.quantization.rounding import BlockRounding, Codes
from graphwright.passes.quantization.rounding.base import BlockTask
from graphwright.passes.quantization.rounding.gptq import gptq
from graphwright.passes.quantization.weights import quantize_weight


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(16, 16), nn.Linear(16, 16)
        self.down = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = x + self.down(torch.tanh(self.q(x)) * self.k(x))
        return y


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def model() -> gw.Program:
    torch.manual_seed(11)
    return gw.trace(Layers(), torch.randn(2, 16))


def data(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(20, 16, generator=generator) for _ in range(3)]


@dataclass(frozen=True)
class Blockwise(BlockRounding):
    """GPTQ of a block's linears, all for the inputs that the block got."""

    method: ClassVar[str] = "blockwise"

    def codes(self, task: BlockTask) -> dict[str, Codes]:
        x = torch.cat([task.rounded.value(task.block.nodes[0].args[0], index) for index in range(task.rounded.batches)])
        wanted = torch.cat([task.exact.value(task.outputs[-1], index) for index in range(task.exact.batches)])
        moment = x.T @ x + 1e-3 * wanted.T @ wanted
        found: dict[str, Codes] = {}
        for target in task.targets:
            name = str(target.weight.target)
            found[name] = gptq(task.rounded.program.tensor(target.weight), moment, task.forms[name])
        return found


CASES: dict[str, Mapping[str, Any]] = {
    "by input": {"bits": 4, "group_size": 16},
    "static": {"activations": "int8", "activation_ranges": "static"},
    "block by block": {"bits": 4, "group_size": 16, "symmetric": False, "rounding": Blockwise()},
    "nearest": {"bits": 4, "group_size": 16, "rounding": "nearest"},
}


@pytest.fixture(scope="module")
def program() -> gw.Program:
    return model()


def quantised(program: gw.Program, batches: Any = None, **options: Any) -> dict[str, torch.Tensor]:
    item = gw.QuantizeLinears(calibration=data() if batches is None else batches, **options)
    small = program.clone()
    item(small)
    return small.tensors()


def same(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> bool:
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


def stop_after(monkeypatch: pytest.MonkeyPatch, count: int) -> list[str]:
    """Let a run fail when it has put so many weights; gives those that were computed."""
    done: list[str] = []
    original = results_module.Results.put

    def put(self: Any, name: str, *given: Any) -> None:
        if len(done) == count:
            raise KeyboardInterrupt
        done.append(name)
        original(self, name, *given)

    monkeypatch.setattr(results_module.Results, "put", put)
    return done


@pytest.mark.parametrize("stop", [0, 1, 4, 8])
@pytest.mark.parametrize("case", list(CASES))
def test_an_interrupted_run_goes_on(
    program: gw.Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, stop: int
) -> None:
    whole = quantised(program, **CASES[case])
    folder = tmp_path / "kept"
    with monkeypatch.context() as patch:
        stop_after(patch, stop)
        with pytest.raises(KeyboardInterrupt):
            quantised(program, checkpoint=folder, **CASES[case])
    assert len(list(folder.glob("weight-*"))) == stop
    assert not list(folder.glob(".*"))
    done = stop_after(monkeypatch, 99)
    assert same(quantised(program, checkpoint=folder, **CASES[case]), whole)
    again = 3 * (stop // 3) if case == "block by block" else stop  # a block's weights are fitted together
    assert len(done) == 9 - again


def test_a_finished_folder_computes_nothing(
    program: gw.Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for case, options in CASES.items():
        first = quantised(program, checkpoint=tmp_path / case, **options)
        with monkeypatch.context() as patch:
            stop_after(patch, 0)
            patch.setattr("graphwright.passes.calibration.stream.run_nodes", None)
            assert same(quantised(program, checkpoint=str(tmp_path / case), **options), first)


def test_the_pass_through_optimize(program: gw.Program, tmp_path: Path) -> None:
    item = gw.QuantizeLinears(bits=4, group_size=16, calibration=data(), checkpoint=tmp_path)
    first, second = (gw.optimize(program, [item], example_inputs=data()[0]) for _ in range(2))
    assert same(first.tensors(), second.tensors())
    assert first.report.rows[0].notes["weights"] == second.report.rows[0].notes["weights"]
    assert item == gw.QuantizeLinears(bits=4, group_size=16, calibration=data())
    assert item.options()["checkpoint"] == str(tmp_path)


_KILLED = """
import sys, time, torch
sys.path.insert(0, sys.argv[1])
import test_calibration_checkpoint as tests
from graphwright.passes.quantization.checkpoint import Checkpoint
torch.set_num_threads(1)
original = Checkpoint.put
def put(self, name, value):
    original(self, name, value)
    print(name, flush=True)
    time.sleep(0.05)
Checkpoint.put = put
tests.quantised(tests.model(), checkpoint=sys.argv[2], **tests.CASES["by input"])
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_killed_process(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        program = model()
        whole = quantised(program, **CASES["by input"])
        command = [sys.executable, "-c", _KILLED, str(Path(__file__).parent), str(tmp_path / "kept")]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for _ in range(4):
                assert process.stdout.readline().startswith("layers.")
            time.sleep(0.02)
            os.kill(process.pid, signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
        kept = len(list((tmp_path / "kept").glob("weight-*")))
        assert 4 <= kept < 9
        assert same(quantised(program, checkpoint=tmp_path / "kept", **CASES["by input"]), whole)
    finally:
        torch.set_num_threads(threads)


# -- folders of other runs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "batches", "differs"),
    [
        ({"bits": 8}, None, "options"),
        ({"group_size": 32}, None, "options"),
        ({"rounding": gw.Gptq(damping=0.1)}, None, "options"),
        ({"ignore": "layers.2.*"}, None, "options"),
        ({}, data(1), "calibration data"),
        ({}, data()[:2], "calibration data"),
        ({"bits": 8}, data(1), "options and calibration data"),
    ],
)
def test_folders_of_other_runs_are_refused(
    program: gw.Program, tmp_path: Path, options: dict[str, Any], batches: Any, differs: str
) -> None:
    base = {"bits": 4, "group_size": 16, "checkpoint": tmp_path}
    quantised(program, **base)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(gw.InputError, match=f"another run: its {differs} differ"):
        quantised(program, batches, **{**base, **options})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_another_model_is_refused(program: gw.Program, tmp_path: Path) -> None:
    base = {"bits": 4, "group_size": 16, "checkpoint": tmp_path}
    quantised(program, **base)
    other = program.clone(copy_weights=True)
    with torch.no_grad():
        other.tensor("layers.1.q.weight").mul_(1.01)
    with pytest.raises(gw.InputError, match="its weights differ"):
        quantised(other, **base)
    with pytest.raises(gw.InputError, match="its program and weights and options differ"):
        quantised(gw.trace(Layer(), torch.randn(2, 16)), **base)


@pytest.mark.parametrize("content", [None, "{", "[]", '{"format": "something else"}'])
def test_folders_of_other_things_are_refused(program: gw.Program, tmp_path: Path, content: str | None) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(gw.InputError, match="is no checkpoint"):
        quantised(program, bits=4, group_size=16, checkpoint=tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert not list(tmp_path.glob("weight-*"))


def test_a_file_in_the_way(program: gw.Program, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(gw.InputError, match="is no checkpoint"):
        quantised(program, bits=4, group_size=16, checkpoint=tmp_path / "file")
    with pytest.raises(SerializationError, match="cannot be written"):
        Checkpoint(tmp_path / "file" / "below", dict.fromkeys(("version", "program"), ""), [])


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "swapped"])
def test_damaged_files_are_done_again(program: gw.Program, tmp_path: Path, damage: str) -> None:
    base = {"bits": 4, "group_size": 16, "checkpoint": tmp_path}
    whole = quantised(program, **base)
    path = tmp_path / "weight-00004.safetensors"
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[-3] ^= 4
    if damage == "swapped":
        content = bytearray((tmp_path / "weight-00005.safetensors").read_bytes())
    path.write_bytes({"cut": content[:-40], "empty": b""}.get(damage, content))
    with pytest.warns(UserWarning, match="'layers.1.k.weight' is damaged and is done again"):
        assert same(quantised(program, **base), whole)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(quantised(program, **base), whole)


# -- what is kept ------------------------------------------------------------------------------------------------------


def test_results_come_back_whole(tmp_path: Path) -> None:
    form = Format(4, 16, False, True)
    packed = quantize_weight(torch.randn(5, 40), form)
    grid = StaticGrid(torch.rand(40), 131, 0.25)
    fingerprint = dict.fromkeys(("version", "program", "weights", "options", "calibration"), "x")
    kept = Checkpoint(tmp_path, fingerprint, ["w", "v"])
    assert kept.get("w") is None
    kept.put("w", results_module.Result(packed, grid))
    found = Checkpoint(tmp_path, fingerprint, ["w", "v"]).get("w")
    assert torch.equal(found.packed.qweight, packed.qweight)
    assert torch.equal(found.packed.scales, packed.scales)
    assert torch.equal(found.packed.zero_points, packed.zero_points)
    assert found.packed.form == form
    assert found.packed.loss == packed.loss
    assert found.packed.columns == 40
    assert torch.equal(found.grid.scales, grid.scales)
    assert (found.grid.zero_point, found.grid.error) == (131, 0.25)
    document = json.loads((tmp_path / "run.json").read_text())
    assert document["options"] == "x"
    with pytest.raises(SerializationError, match="cannot hold a set"):
        kept.put("v", {1, 2})
