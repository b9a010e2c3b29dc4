"""Files: all or nothing, weights beside the model, paths and disks that refuse, wrong translations that are stopped."""

from __future__ import annotations

import errno
import os
import resource
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
import pytest
import torch
from torch import nn

import graphwright as gw
from graphwright.backends.onnx import writing
from graphwright.backends.onnx.translations import linear as linear_translation


@pytest.fixture
def program() -> gw.Program:
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 8))
    return gw.trace(model, torch.randn(3, 32), dynamic={"input": {0: "batch"}})


def names(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.iterdir())


def test_weights_beside_the_file_on_request(tmp_path: Path, program: gw.Program) -> None:
    report = gw.export_onnx(program, tmp_path / "model.onnx", external_data=True)
    assert names(tmp_path) == ["model.onnx", "model.onnx.data"]
    assert [each.name for each in report.files] == ["model.onnx.data", "model.onnx"]
    assert report.bytes == sum(each.stat().st_size for each in tmp_path.iterdir())
    graph = onnx.load(tmp_path / "model.onnx", load_external_data=False).graph
    outside = {each.name: each.external_data for each in graph.initializer if each.external_data}
    assert set(outside) == {"0.weight", "2.weight"}
    assert all({entry.key: entry.value for entry in each}["location"] == "model.onnx.data" for each in outside.values())
    weight = next(each for each in onnx.load(tmp_path / "model.onnx").graph.initializer if each.name == "0.weight")
    assert torch.equal(torch.from_numpy(onnx.numpy_helper.to_array(weight).copy()), program.tensor("0.weight"))


def test_large_weights_go_beside_the_file_by_themselves(
    tmp_path: Path, program: gw.Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "INLINE_LIMIT", 4096)
    gw.export_onnx(program, tmp_path / "model.onnx")
    assert names(tmp_path) == ["model.onnx", "model.onnx.data"]
    with pytest.raises(gw.ExportError, match="do not fit into one ONNX file"):
        gw.export_onnx(program, tmp_path / "other.onnx", external_data=False)
    assert names(tmp_path) == ["model.onnx", "model.onnx.data"]


def test_a_file_is_replaced_and_its_old_weights_go(tmp_path: Path, program: gw.Program) -> None:
    gw.export_onnx(program, tmp_path / "model.onnx", external_data=True)
    gw.export_onnx(program, tmp_path / "model.onnx", external_data=True)
    assert names(tmp_path) == ["model.onnx", "model.onnx.data"]
    gw.export_onnx(program, tmp_path / "model.onnx")
    assert names(tmp_path) == ["model.onnx"]
    onnx.checker.check_model(os.fspath(tmp_path / "model.onnx"))


def test_weights_of_any_layout_are_written(tmp_path: Path) -> None:
    """A weight that is a transposed view is stored as the tensor it is."""
    model = nn.Linear(6, 4, bias=False)
    model.weight = nn.Parameter(torch.randn(6, 4).t())
    program = gw.trace(model, torch.randn(3, 6))
    gw.export_onnx(program, tmp_path / "model.onnx")
    weight = onnx.load(tmp_path / "model.onnx").graph.initializer[0]
    assert torch.equal(torch.from_numpy(onnx.numpy_helper.to_array(weight).copy()), model.weight)


# -- paths that cannot be written --------------------------------------------------------------------------------------


def test_a_missing_folder_is_named(tmp_path: Path, program: gw.Program) -> None:
    with pytest.raises(gw.ExportError, match="the folder does not exist") as caught:
        gw.export_onnx(program, tmp_path / "missing" / "model.onnx")
    assert str(tmp_path / "missing") in str(caught.value)


def test_a_folder_is_no_file(tmp_path: Path, program: gw.Program) -> None:
    with pytest.raises(gw.ExportError, match="the path is a folder"):
        gw.export_onnx(program, tmp_path)


def test_a_file_is_no_folder(tmp_path: Path, program: gw.Program) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(gw.ExportError, match="is not a folder"):
        gw.export_onnx(program, tmp_path / "file" / "model.onnx")


def test_a_folder_without_permission(tmp_path: Path, program: gw.Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # the superuser may write anywhere
    with pytest.raises(gw.ExportError, match="the folder cannot be written"):
        gw.export_onnx(program, tmp_path / "model.onnx")
    assert names(tmp_path) == []


def test_a_read_only_file_system(tmp_path: Path, program: gw.Program, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**options: Any) -> str:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    with pytest.raises(gw.ExportError, match="Read-only file system"):
        gw.export_onnx(program, tmp_path / "model.onnx")


# -- disks that are full -----------------------------------------------------------------------------------------------


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """The system refuses to let a file grow beyond this, in the middle of a write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("external", [False, True])
def test_a_write_cut_short_leaves_the_old_file(tmp_path: Path, program: gw.Program, external: bool) -> None:
    gw.export_onnx(program, tmp_path / "model.onnx", external_data=external)
    before = {each.name: each.read_bytes() for each in tmp_path.iterdir()}
    with files_no_larger_than(6000), pytest.raises(gw.ExportError, match="could not be written") as caught:
        gw.export_onnx(program, tmp_path / "model.onnx", external_data=external)
    assert "free some space" in str(caught.value)
    assert {each.name: each.read_bytes() for each in tmp_path.iterdir()} == before


@pytest.mark.parametrize("external", [False, True])
def test_a_write_cut_short_leaves_nothing(tmp_path: Path, program: gw.Program, external: bool) -> None:
    with files_no_larger_than(6000), pytest.raises(gw.ExportError, match="could not be written"):
        gw.export_onnx(program, tmp_path / "model.onnx", external_data=external)
    assert names(tmp_path) == []


def test_a_disk_that_is_full_when_flushed(tmp_path: Path, program: gw.Program, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(gw.ExportError, match="No space left on device"):
        gw.export_onnx(program, tmp_path / "model.onnx")
    assert names(tmp_path) == []


def test_a_failed_move_restores_what_stood_there(
    tmp_path: Path, program: gw.Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The data file is in place already when the model's move fails: both go back."""
    gw.export_onnx(program, tmp_path / "model.onnx", external_data=True)
    before = {each.name: each.read_bytes() for each in tmp_path.iterdir()}
    other = gw.trace(nn.Linear(32, 64), torch.randn(3, 32))
    replace = os.replace

    def fail_for_the_model(source: Any, target: Any) -> None:
        if Path(target) == tmp_path / "model.onnx" and "previous" not in str(source):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail_for_the_model)
    with pytest.raises(gw.ExportError, match="could not be written"):
        gw.export_onnx(other, tmp_path / "model.onnx", external_data=True)
    assert {each.name: each.read_bytes() for each in tmp_path.iterdir()} == before


def test_an_interrupted_export_cleans_up(tmp_path: Path, program: gw.Program, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(onnx_ir, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        gw.export_onnx(program, tmp_path / "model.onnx")
    assert names(tmp_path) == []


# -- options and inputs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "fast"}, "must be runtime or portable, not 'fast'"),
        ({"opset": 20}, "20 is not supported"),
        ({"opset": 27}, "27 is not supported"),
        ({"opset": "23"}, "must be a number"),
        ({"accuracy_level": 2}, "2 is not one of 0, 1, 4"),
    ],
)
def test_options_are_checked_first(tmp_path: Path, program: gw.Program, options: dict[str, Any], message: str) -> None:
    with pytest.raises(gw.InputError, match=message):
        gw.export_onnx(program, tmp_path / "model.onnx", **options)
    assert names(tmp_path) == []


def test_example_inputs_that_do_not_fit(tmp_path: Path, program: gw.Program) -> None:
    with pytest.raises(gw.InputError, match="has 31 in dimension 1"):
        gw.export_onnx(program, tmp_path / "model.onnx", example_inputs=[torch.randn(2, 31)])
    with pytest.raises(gw.InputError, match="2 tensors, the program takes 1"):
        gw.export_onnx(program, tmp_path / "model.onnx", example_inputs=[torch.randn(2, 32)] * 2)
    with pytest.raises(gw.InputError, match="is missing"):
        gw.export_onnx(program, tmp_path / "model.onnx", example_inputs={})
    assert names(tmp_path) == []


@pytest.mark.parametrize("examples", [torch.ones(4, 32), [torch.ones(4, 32)], {"input": torch.ones(4, 32)}])
def test_example_inputs_in_every_form(tmp_path: Path, program: gw.Program, examples: Any) -> None:
    report = gw.export_onnx(program, tmp_path / "model.onnx", example_inputs=examples)
    assert [each.sizes for each in report.differences] == ["batch=4", "batch=7"]


# -- wrong files -------------------------------------------------------------------------------------------------------


def _without_bias(lower: Any, node: Any, x: Any, weight: Any, bias: Any = None) -> None:
    lower.set_rows(node, lower.graph.call("Gemm", lower.rows(x), lower.tensor(weight), transB=1))


def _slightly_off(lower: Any, node: Any, x: Any, weight: Any, bias: Any = None) -> None:
    operands = (lower.rows(x), lower.tensor(weight), lower.tensor(bias))
    lower.set_rows(node, lower.graph.call("Gemm", *operands, transB=1, alpha=1.0001))


@pytest.mark.parametrize("wrong", [_without_bias, _slightly_off])
def test_a_wrong_translation_is_stopped(
    tmp_path: Path, program: gw.Program, monkeypatch: pytest.MonkeyPatch, wrong: Any
) -> None:
    monkeypatch.setattr(linear_translation, "linear", wrong)
    with pytest.raises(gw.ExportError, match="from the program"):
        gw.export_onnx(program, tmp_path / "model.onnx")
    assert names(tmp_path) == []
    report = gw.export_onnx(program, tmp_path / "model.onnx", check=False)
    assert "not checked" in str(report)


def test_a_tolerance_may_be_given(tmp_path: Path, program: gw.Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_translation, "linear", _slightly_off)
    report = gw.export_onnx(program, tmp_path / "model.onnx", tolerance=0.01)
    assert 0 < report.error < 0.01


def test_a_runtime_that_refuses_the_file(tmp_path: Path, program: gw.Program, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(lower: Any, node: Any, x: Any, weight: Any, bias: Any = None) -> None:
        lower.set_rows(node, lower.graph.call("NoSuchOperator", lower.rows(x)))

    monkeypatch.setattr(linear_translation, "linear", unknown)
    with pytest.raises(gw.ExportError, match="onnxruntime does not open the file"):
        gw.export_onnx(program, tmp_path / "model.onnx")
    with pytest.raises(gw.ExportError, match="not valid ONNX"):
        gw.export_onnx(program, tmp_path / "model.onnx", mode="portable")
    assert names(tmp_path) == []


def test_the_program_is_not_changed(tmp_path: Path, program: gw.Program) -> None:
    before, versions = str(program), {name: tensor._version for name, tensor in program.tensors().items()}
    gw.export_onnx(program, tmp_path / "model.onnx", external_data=True)
    assert str(program) == before
    assert {name: tensor._version for name, tensor in program.tensors().items()} == versions
