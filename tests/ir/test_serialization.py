"""Programs on disk: complete, lazily read, and never half-written."""

from __future__ import annotations

import gc
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from safetensors.torch import load_file
from tests.ir.models import EVERYTHING, assert_same_bits, encoder_inputs, encoder_program, everything_tensors
from torch import nn

from graphwright.frontends.torch import trace
from graphwright.ir import serialization, weights_file
from graphwright.ir.equality import first_difference
from graphwright.ir.errors import SerializationError
from graphwright.ir.parser import parse
from graphwright.ir.program import JournalEntry, Program
from graphwright.ir.serialization import check_integrity
from graphwright.ir.text import print_program
from graphwright.ir.verifier import verify
from graphwright.ir.weights_file import WeightsFile, write_tensors


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_same_program(found: Program, expected: Program) -> None:
    assert first_difference(found, expected, names=True, provenance=True, values=True) is None
    assert print_program(found) == print_program(expected)
    assert [name for name, _ in found.named_parameters()] == [name for name, _ in expected.named_parameters()]


@pytest.fixture
def program() -> Program:
    return parse(EVERYTHING, everything_tensors())


# -- a round trip ------------------------------------------------------------------------------------------------------


def test_a_saved_program_is_the_same_program(tmp_path: Path) -> None:
    model, program = encoder_program()
    program.journal = [JournalEntry("quantize-linears", {"bits": 4, "where": ["a", "b"]}, True, {"error": 1e-3})]
    program.save(tmp_path / "new" / "folder")
    assert files_in(tmp_path / "new" / "folder") == ["model.safetensors", "program.json"]
    again = Program.load(tmp_path / "new" / "folder")
    assert_same_program(again, program)
    verify(again)
    assert again.journal == program.journal
    assert_same_bits(again(**encoder_inputs()), model(**encoder_inputs()))
    assert list(again.state_dict()) == list(program.state_dict())


def test_every_part_of_a_program_survives(tmp_path: Path, program: Program) -> None:
    program.save(tmp_path)
    again = Program.load(tmp_path)
    assert_same_program(again, program)
    assert again.tensor("frozen").stride() == (1, 4)
    assert not again.tensor("frozen").requires_grad
    assert again.tensor("state").requires_grad


def test_a_tied_weight_is_stored_once_and_stays_tied(tmp_path: Path) -> None:
    _, program = encoder_program()
    program.save(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert set(stored) == set(program.tensors())
    assert "head.weight" not in stored
    again = Program.load(tmp_path)
    assert again.aliases == {"head.weight": "embed.weight"}
    assert again.state_dict()["head.weight"].data_ptr() == again.state_dict()["embed.weight"].data_ptr()


@pytest.mark.parametrize("name", ["minilm", "tinylm"])
def test_real_models_return_their_own_output_type(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    program: Program = request.getfixturevalue(f"{name}_program")
    batch = request.getfixturevalue("token_batch")
    program.save(tmp_path)
    again = Program.load(tmp_path)
    assert_same_program(again, program)
    found, expected = again(**batch), program(**batch)
    assert type(found) is type(expected)
    assert_same_bits(found, expected)
    size = sum(tensor.numel() * tensor.element_size() for tensor in program.tensors().values())
    assert size < (tmp_path / "model.safetensors").stat().st_size < size + 40_000


def test_a_program_that_returns_a_transformers_output_loads_in_a_fresh_process(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    parse(
        """program P(batch: 1..) {
          takes ((input "x",), {})
          gives type "transformers.modeling_outputs.BaseModelOutput" ["last_hidden_state"] (*)
          %x = input "x" : f32[batch, 4]
          return %x
        }"""
    ).save(tmp_path)
    script = (
        "import sys, torch\n"
        "from graphwright.ir.program import Program\n"
        "assert 'transformers' not in sys.modules\n"
        "print(type(Program.load(sys.argv[1])(torch.ones(2, 4))).__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout.strip() == "BaseModelOutput", done.stderr


def test_without_transformers_the_error_says_what_is_missing(tmp_path: Path) -> None:
    text = EVERYTHING.replace('{"logits": *,', 'type "transformers_that_is_missing.Output" ["a"] (*,', 1).replace(
        '"parts": (*, [*])}', "(*, [*]))", 1
    )
    with pytest.raises(SerializationError, match=r"there is no module 'transformers_that_is_missing' here"):
        _saved_with_text(tmp_path, text)


@pytest.mark.parametrize("dtype", list(weights_file._NAMES), ids=str)
def test_every_dtype_is_stored(dtype: torch.dtype, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    values = torch.randint(0, 100, (3, 5), generator=generator)
    tensors = {
        "matrix": (values % 2 if dtype == torch.bool else values).to(dtype),
        "scalar": torch.ones((), dtype=dtype),
        "empty": torch.ones((0, 3), dtype=dtype),
        "turned": values.to(dtype).t(),
        "strided": values.to(dtype)[:, ::2],
    }
    with (tmp_path / "file").open("wb") as file:
        write_tensors(file, tensors)
    found = WeightsFile(tmp_path / "file")
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == dtype
        assert found[name].shape == tensor.shape
        assert found[name].tolist() == tensor.tolist()


def test_special_floats_keep_their_bits(tmp_path: Path) -> None:
    payload = torch.tensor([0x7FC00001, -0x400000, 0x7F800000, -0x80000000, 1], dtype=torch.int32).view(torch.float32)
    conjugate = torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex64).conj()
    with (tmp_path / "file").open("wb") as file:
        write_tensors(file, {"floats": payload, "complex": conjugate})
    found = WeightsFile(tmp_path / "file")
    assert found["floats"].view(torch.int32).tolist() == payload.view(torch.int32).tolist()
    assert found["complex"].tolist() == [1 - 2j, 3 + 4j]


def test_strides_survive_where_they_are_not_the_usual_ones(tmp_path: Path) -> None:
    base = torch.arange(24.0)
    tensors = {
        "turned": base.view(4, 6).t(),
        "permuted": base.view(2, 3, 4).permute(2, 0, 1),
        "expanded": torch.tensor([[1.0], [2.0]]).expand(2, 3),
        "stepped": base[::2],
        "scalar": torch.tensor(5.0),
    }
    lines = [
        f'%{name} = buffer "{name}" : f32[{", ".join(map(str, tensor.shape))}]'
        + (f" strides ({', '.join(map(str, tensor.stride()))})" if not tensor.is_contiguous() else "")
        for name, tensor in tensors.items()
    ]
    results = ", ".join(f"%{name}" for name in tensors)
    program = parse("program P() {\n" + "\n".join(lines) + f"\nreturn {results}\n}}", tensors)
    program.save(tmp_path)
    again = Program.load(tmp_path)
    assert_same_program(again, program)
    for name, tensor in tensors.items():
        assert again.tensor(name).stride() == tensor.stride()
        assert torch.equal(again.tensor(name), tensor)


class Plain(nn.Module):
    """No weights at all."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


def test_a_program_without_weights(tmp_path: Path) -> None:
    program = trace(Plain(), torch.ones(3, 4))
    program.save(tmp_path)
    assert_same_program(Program.load(tmp_path), program)


def test_a_loaded_program_trains_and_leaves_the_file_alone(tmp_path: Path) -> None:
    _, program = encoder_program()
    program.save(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    again = Program.load(tmp_path)
    again(**encoder_inputs())["logits"].square().sum().backward()
    weight = dict(again.named_parameters())["layers.0.0.weight"]
    assert weight.grad is not None
    torch.optim.SGD(again.parameters(), lr=0.1).step()
    assert not torch.equal(weight, program.tensor("layers.0.0.weight"))
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_weights_are_mapped_not_read(tmp_path: Path) -> None:
    size = 64 << 20
    program = parse(
        f'program P() {{\n %w = weight "w" : f32[{size // 4}]\n %b = buffer "b" : u8[{size}]\n return %w, %b\n}}',
        {"w": torch.zeros(size // 4), "b": torch.zeros(size, dtype=torch.uint8)},
    )
    program.save(tmp_path)
    del program
    gc.collect()
    before = resident_bytes()
    again = Program.load(tmp_path)
    assert resident_bytes() - before < size // 4
    assert int(again.tensor("b").sum()) == 0
    assert resident_bytes() - before >= size // 2, "the bytes load when they are used"


def resident_bytes() -> int:
    statm = Path("/proc/self/statm")
    if not statm.is_file():
        pytest.skip("needs /proc/self/statm to measure memory")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_saving_takes_no_second_copy_of_the_weights(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    size = 192 << 20
    program = parse(
        f'program P() {{\n %w = weight "w" : f32[{size // 4}]\n return %w\n}}', {"w": torch.ones(size // 4)}
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    program.save(tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before < size // 2


def test_journals_hold_json_values_only(tmp_path: Path, program: Program) -> None:
    program.journal = [JournalEntry("a-pass", {"x": (1, 2.5)}, False, {"error": float("inf")})]
    program.save(tmp_path)
    assert Program.load(tmp_path).journal == [JournalEntry("a-pass", {"x": [1, 2.5]}, False, {"error": "inf"})]
    json.loads((tmp_path / "program.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    program.journal = [JournalEntry("a-pass", {"x": object()}, False)]
    with pytest.raises(SerializationError, match=r"is not a JSON value \(at journal entry of 'a-pass'\)"):
        program.save(tmp_path)


# -- saving over a program ---------------------------------------------------------------------------------------------


def other_program(program: Program) -> Program:
    """The same with other weights and another text."""
    other = program.clone(copy_weights=True)
    with torch.no_grad():
        other.tensor("embed.weight").add_(1)
    other.title = "Other"
    return other


def test_saving_again_replaces_the_program_and_nothing_else(tmp_path: Path, program: Program) -> None:
    (tmp_path / "tokenizer.json").write_text("mine")
    program.save(tmp_path)
    other = other_program(program)
    other.save(tmp_path)
    assert files_in(tmp_path) == ["model.safetensors", "program.json", "tokenizer.json"]
    assert_same_program(Program.load(tmp_path), other)
    other.save(tmp_path)
    assert files_in(tmp_path) == ["model.safetensors", "program.json", "tokenizer.json"]


def test_a_program_can_be_saved_where_it_was_loaded_from(tmp_path: Path, program: Program) -> None:
    program.save(tmp_path)
    loaded = Program.load(tmp_path)
    loaded.title = "Renamed"
    loaded.save(tmp_path)
    again = Program.load(tmp_path)
    assert again.title == "Renamed"
    assert_same_bits(list(again.tensors().values()), list(program.tensors().values()))


def test_equal_programs_are_saved_as_equal_files(tmp_path: Path, program: Program) -> None:
    program.save(tmp_path / "a")
    program.clone(copy_weights=True).save(tmp_path / "b")
    for name in ("model.safetensors", "program.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_files_are_readable_as_others_are(tmp_path: Path, program: Program) -> None:
    program.save(tmp_path)
    (tmp_path / "usual").write_text("")
    usual = stat.S_IMODE((tmp_path / "usual").stat().st_mode)
    for name in ("model.safetensors", "program.json"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == usual


class FullDisk:
    """A file on a disk that is full after so many bytes."""

    def __init__(self, file: BinaryIO, space: int) -> None:
        self.file, self.space = file, space

    def write(self, data: bytes) -> int:
        self.space -= len(data)
        if self.space < 0:
            raise OSError(28, "No space left on device")
        return self.file.write(data)

    def seek(self, place: int) -> int:
        return self.file.seek(place)


@pytest.mark.parametrize("space", [0, 5, 700, 1000])
def test_a_disk_full_while_writing_weights_leaves_the_old_program(
    space: int, tmp_path: Path, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    program.save(tmp_path / "old")
    before = {name: (tmp_path / "old" / name).read_bytes() for name in files_in(tmp_path / "old")}
    write: Callable[[Any, Any], str] = write_tensors
    monkeypatch.setattr(serialization, "write_tensors", lambda file, tensors: write(FullDisk(file, space), tensors))
    for folder in (tmp_path / "old", tmp_path / "a" / "b"):
        with pytest.raises(SerializationError, match="could not be saved: No space left on device"):
            other_program(program).save(folder)
    assert {name: (tmp_path / "old" / name).read_bytes() for name in files_in(tmp_path / "old")} == before
    assert files_in(tmp_path) == ["old"], "a folder made for the save goes with it"
    assert_same_program(Program.load(tmp_path / "old"), program)


@pytest.mark.parametrize("step", range(6))
def test_a_save_interrupted_anywhere_leaves_the_old_program_or_the_new_one(
    step: int, tmp_path: Path, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every system call that changes the folder fails once, as if the process had been killed before it."""
    program.save(tmp_path)
    other = other_program(program)
    calls = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > step:
                raise OSError(5, "Input/output error")
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", counted(os.replace))
        patch.setattr(os, "fsync", counted(os.fsync))
        patch.setattr(Path, "unlink", counted(Path.unlink))
        try:
            other.save(tmp_path)
        except SerializationError:
            assert step < 6
    loaded = Program.load(tmp_path)
    assert_same_program(loaded, other if loaded.title == "Other" else program)
    check_integrity(tmp_path)
    # Whatever was left behind does not stand in the way of the next save.
    program.save(tmp_path)
    assert_same_program(Program.load(tmp_path), program)


def test_a_program_is_whole_between_the_deciding_step_and_the_last(
    tmp_path: Path, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    program.save(tmp_path)
    other = other_program(program)
    replace, targets = os.replace, list[str]()

    def last_fails(source: Any, target: Any) -> None:
        targets.append(Path(target).name)
        if targets[-1] == "model.safetensors":
            raise OSError(5, "Input/output error")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", last_fails)
        with pytest.raises(SerializationError):
            other.save(tmp_path)
    assert targets[-2:] == ["program.json", "model.safetensors"]
    assert_same_program(Program.load(tmp_path), other)
    other.save(tmp_path)
    assert files_in(tmp_path) == ["model.safetensors", "program.json"]
    assert_same_program(Program.load(tmp_path), other)


def test_a_real_limit_on_file_size(tmp_path: Path, program: Program) -> None:
    resource = pytest.importorskip("resource")
    program.save(tmp_path)
    big = parse('program P() {\n %w = weight "w" : f32[100000]\n return %w\n}', {"w": torch.ones(100_000)})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(SerializationError, match="File too large") as caught:
            big.save(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "what was saved there before is untouched" in str(caught.value)
    assert files_in(tmp_path) == ["model.safetensors", "program.json"]
    assert_same_program(Program.load(tmp_path), program)


def test_another_models_weights_are_not_overwritten(tmp_path: Path, program: Program) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"the original")
    with pytest.raises(SerializationError, match="not a saved program's, and saving would overwrite it"):
        program.save(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == b"the original"


def test_a_place_that_cannot_be_written(tmp_path: Path, program: Program) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(
            SerializationError, match=r"could not be saved: .*\n  -> free space or choose another folder"
        ):
            program.save(path)
    assert (tmp_path / "file").read_text() == ""


@pytest.mark.parametrize(
    ("tensor", "says"),
    [
        (torch.empty(2, 2, device="meta"), "has no values"),
        (torch.eye(2).to_sparse(), "has layout torch.sparse_coo, which cannot be stored"),
        (torch.eye(2, dtype=torch.complex128), "has dtype torch.complex128, which safetensors cannot store"),
    ],
)
def test_weights_that_cannot_be_stored(tensor: torch.Tensor, says: str, tmp_path: Path) -> None:
    program = parse('program P() {\n %w = buffer "w" : f32[2, 2]\n return %w\n}', {"w": torch.eye(2)})
    program.set_tensor("w", tensor)
    with pytest.raises(SerializationError, match=f"{says} .*at weight 'w'"):
        program.save(tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_values_and_types_that_cannot_be_written(tmp_path: Path, program: Program) -> None:
    node = program.node("shifted")
    node.kwargs = {"alpha": slice(1, 2)}
    with pytest.raises(SerializationError, match="a value that has no written form") as caught:
        program.save(tmp_path / "x")
    assert "%shifted = aten.add.Tensor" in str(caught.value)
    local = trace(Local(), torch.ones(2, 3))
    with pytest.raises(SerializationError, match="cannot be found again in another process"):
        local.save(tmp_path / "x")
    assert "takes ?" in print_program(local), "it can still be looked at"
    assert not (tmp_path / "x").exists()


class Local(nn.Module):
    """Returns a type that no other process can find."""

    def forward(self, x: torch.Tensor) -> Any:
        return _local_type()(x)


def _local_type() -> Any:
    if "kind" not in _LOCAL:
        from collections import namedtuple

        class Place:
            Kind = namedtuple("Kind", "a")

        Place.Kind.__qualname__ = "_local_type.<locals>.Kind"
        _LOCAL["kind"] = Place.Kind
    return _LOCAL["kind"]


_LOCAL: dict[str, Any] = {}


# -- damaged files -----------------------------------------------------------------------------------------------------


def _saved_with_text(folder: Path, text: str) -> Program:
    """Save a program, put another text into its file, load it."""
    parse(EVERYTHING, everything_tensors()).save(folder)
    document = json.loads((folder / "program.json").read_text())
    document["text"] = text.splitlines()
    (folder / "program.json").write_text(json.dumps(document))
    return Program.load(folder)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("f32[11, 4]", "f32[11, 5]", r"the weight 'embed.weight' is f32\[11, 4\], the text says f32\[11, 5\]"),
        ("bool[4]", "u8[4]", r"the weight 'mask' is bool\[4\], the text says u8\[4\]"),
        ("aten.clamp(", "aten.squash(", "no operator is named 'aten.squash'"),
        ("aten.clamp(", "graphwright.squash(", "the dialect has no operator 'squash'"),
        ('"state"', '"status"', "no tensor was given for the weight 'status'"),
        ("return", "retrun", "or 'return', found 'retrun'"),
    ],
)
def test_text_and_weights_that_do_not_fit(old: str, new: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(SerializationError, match=says) as caught:
        _saved_with_text(tmp_path, EVERYTHING.replace(old, new))
    assert caught.value.where is not None
    assert caught.value.where.startswith(f"{tmp_path / 'program.json'}, line ")
    assert caught.value.hint is not None


def test_a_weight_too_many(tmp_path: Path) -> None:
    text = EVERYTHING.replace('  %t = buffer "state" : f32[4]  trained\n', "").replace(
        "%scaled, %t,", "%scaled, %scaled,"
    )
    with pytest.raises(SerializationError, match="do not have the same weights; they differ in state"):
        _saved_with_text(tmp_path, text)


def test_missing_folder_and_files(tmp_path: Path, program: Program) -> None:
    with pytest.raises(SerializationError, match="there is no such folder"):
        Program.load(tmp_path / "nowhere")
    with pytest.raises(SerializationError, match="the folder holds no program.json"):
        Program.load(tmp_path)
    program.save(tmp_path)
    with pytest.raises(SerializationError, match="is a file, not a folder"):
        Program.load(tmp_path / "program.json")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(SerializationError, match="the file is missing"):
        Program.load(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, -1])
def test_truncated_weights(keep: float, tmp_path: Path, program: Program) -> None:
    program.save(tmp_path)
    path = tmp_path / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(SerializationError, match=r"the file is truncated or damaged \(\d+ bytes\)") as caught:
        Program.load(tmp_path)
    assert str(path) in str(caught.value)


def test_truncated_program(tmp_path: Path, program: Program) -> None:
    program.save(tmp_path)
    path = tmp_path / "program.json"
    data = path.read_bytes()
    for keep in (0, 10, len(data) // 2, len(data) - 3):
        path.write_bytes(data[:keep])
        with pytest.raises(SerializationError, match="truncated or damaged: save the program again"):
            Program.load(tmp_path)
    path.write_bytes(b"\xff\xfe" + data)
    with pytest.raises(SerializationError, match="cannot be read"):
        Program.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"version": 2}, "format version 2, this graphwright reads version 1"),
        ({"version": None}, "format version None"),
        ({"format": "torch"}, "is not a graphwright program"),
        ({"text": "program"}, "lacks a part of a program"),
        ({"journal": [{"pass": "x"}]}, "lacks a part of a program"),
        ({"weights": {"file": "../../etc/passwd", "digest": "", "order": []}}, "lacks a part of a program"),
        ({"weights": None}, "lacks a part of a program"),
    ],
)
def test_another_format(change: dict[str, Any], says: str, tmp_path: Path, program: Program) -> None:
    program.save(tmp_path)
    path = tmp_path / "program.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(SerializationError, match=says):
        Program.load(tmp_path)
    path.write_text("[]")
    with pytest.raises(SerializationError, match="is not a graphwright program"):
        Program.load(tmp_path)


def test_weights_of_another_program(tmp_path: Path, program: Program) -> None:
    program.save(tmp_path / "a")
    other_program(program).save(tmp_path / "b")
    os.replace(tmp_path / "b" / "model.safetensors", tmp_path / "a" / "model.safetensors")
    with pytest.raises(SerializationError, match="the weights belong to another program"):
        Program.load(tmp_path / "a")


def test_a_flipped_bit_is_found_when_asked_for(tmp_path: Path, program: Program) -> None:
    program.save(tmp_path)
    check_integrity(tmp_path)
    path = tmp_path / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(SerializationError, match="the file is damaged"):
        check_integrity(tmp_path)


def test_no_pickle_in_the_files(tmp_path: Path) -> None:
    _, program = encoder_program()
    program.save(tmp_path)
    assert files_in(tmp_path) == ["model.safetensors", "program.json"]
    document = json.loads((tmp_path / "program.json").read_text())
    assert set(document) == {"format", "version", "torch", "weights", "journal", "records", "text"}
    assert set(load_file(tmp_path / "model.safetensors")) == set(program.tensors())
