"""Packed models on disk: the same answers as before saving, and clear errors for files that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

import graphwright as gw
from graphwright.backends.cpu import native_status, packed_file
from graphwright.ir.errors import BackendError, InputError, SerializationError

pytestmark = pytest.mark.skipif(not native_status().available, reason=native_status().message)


class Block(nn.Module):
    """Linears of every kind, one weight used twice, and an operator that stays in PyTorch."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 200), nn.Linear(200, 64)
        self.shift = nn.Parameter(torch.randn(64))

    def forward(self, x: torch.Tensor, *, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        """Two results."""
        y = self.down(nn.functional.gelu(self.up(x))) + x
        return {"y": torch.cumsum(y * scale, -1) + self.shift, "again": self.up(y + self.shift)}


BACKENDS = {
    "int4": ([gw.QuantizeLinears(bits=4, group_size=32)], gw.CpuBackend(compute="int8")),
    "int4 asymmetric": ([gw.QuantizeLinears(bits=4, group_size=32, symmetric=False)], gw.CpuBackend(compute="int8")),
    "int8": ([gw.QuantizeLinears(bits=8, activations="int8")], gw.CpuBackend()),
    "float32": ([], gw.CpuBackend()),
}


def packed(folder: Path, kind: str = "int8") -> tuple[gw.OptimizedModel, Path]:
    torch.manual_seed(0)
    passes, backend = BACKENDS[kind]
    inputs = {"x": torch.randn(3, 64), "scale": torch.ones(64)}
    small = gw.optimize(Block().eval(), passes, example_inputs=inputs, target=backend, verify=False)
    small.save_packed(folder / "model.packed")
    return small, folder / "model.packed"


@pytest.mark.parametrize("kind", BACKENDS)
def test_a_loaded_model_gives_the_same(kind: str, tmp_path: Path) -> None:
    small, path = packed(tmp_path, kind)
    loaded = gw.load_packed(path)
    for rows in (1, 5, 40):
        x, scale = torch.randn(rows, 64), torch.rand(64)
        found, wanted = loaded(x, scale=scale), small(x, scale=scale)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert loaded.explain() == small.explain()
    with pytest.raises(InputError, match="dtype"):
        loaded(torch.zeros(3, 64, dtype=torch.int64), scale=torch.ones(64))


def test_weights_are_mapped_aligned_and_kept_once(tmp_path: Path) -> None:
    small, path = packed(tmp_path)
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    large = [tensor for tensor in tensors.values() if tensor.nbytes % 64 == 0]
    assert large
    assert all(tensor.data_ptr() % 64 == 0 for tensor in large)
    codes = [tensor for tensor in tensors.values() if tensor.dtype == torch.uint8]
    assert len(codes) == 2  # `up` is called twice
    # Nothing of the unpacked weights is in the file.
    assert path.stat().st_size < 64 * 256 + 256 * 64 + 40_000
    del small


def test_only_the_cpu_target_packs(tmp_path: Path) -> None:
    small = gw.optimize(Block().eval(), [], example_inputs={"x": torch.randn(3, 64), "scale": torch.ones(64)})
    with pytest.raises(BackendError, match="reference"):
        small.save_packed(tmp_path / "model.packed")
    assert not list(tmp_path.iterdir())


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small, path = packed(tmp_path)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packed_file, "write_tensors", full)
    with pytest.raises(SerializationError, match="No space left"):
        small.save_packed(path)
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["model.packed"]
    with pytest.raises(SerializationError, match="could not be saved"):
        small.save_packed(tmp_path / "no" / "folder" / "model.packed")


@pytest.mark.parametrize("kept", [0, 7, 100, 5000, -1])
def test_truncated_files(kept: int, tmp_path: Path) -> None:
    _, path = packed(tmp_path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(SerializationError, match="truncated or damaged"):
        gw.load_packed(path)


def test_files_that_are_something_else(tmp_path: Path) -> None:
    with pytest.raises(SerializationError, match="missing"):
        gw.load_packed(tmp_path / "none")
    _, path = packed(tmp_path)
    other = tmp_path / "other"
    for change, message in [
        ({"version": 2}, "format version 2"),
        ({"layout": "panels of 16"}, "packed in panels of 16; the kernels on this CPU take panels of 64"),
        ({"format": "x"}, "not a packed model"),
        ({"calls": [{"node": "nobody"}]}, "does not load"),
        ({"text": ["program"]}, "does not load"),
        ({"uses": None}, "does not load"),
    ]:
        rewrite(path, other, change)
        with pytest.raises(SerializationError, match=message):
            gw.load_packed(other)


def test_operands_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    _, path = packed(tmp_path)
    document = json.loads(header(path)["__metadata__"][packed_file.KEY])
    document["calls"][0]["given"]["packed"]["fields"]["outputs"] = 4096
    rewrite(path, path, document)
    with pytest.raises(SerializationError, match="wrong size"):
        gw.load_packed(path)


def test_another_instruction_set_reads_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small, path = packed(tmp_path)
    monkeypatch.setenv("GRAPHWRIGHT_CPU_ISA", "scalar")
    loaded = gw.load_packed(path)
    x, scale = torch.randn(2, 64), torch.ones(64)
    assert torch.equal(loaded(x, scale=scale)["again"], small(x, scale=scale)["again"])
    assert any("scalar" in use.kernel for use in loaded.explain())
    monkeypatch.setenv("GRAPHWRIGHT_CPU_ISA", "nonsense")
    with pytest.raises(InputError, match="names no instruction set"):
        gw.load_packed(path)


def header(path: Path) -> dict[str, dict[str, str]]:
    data = path.read_bytes()
    found: dict[str, dict[str, str]] = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return found


def rewrite(path: Path, to: Path, change: dict[str, object]) -> None:
    """The file with other entries in its document."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    entries = header(path)
    document = {**json.loads(entries["__metadata__"][packed_file.KEY]), **change}
    entries["__metadata__"][packed_file.KEY] = json.dumps(document)
    text = json.dumps(entries).encode()
    to.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
