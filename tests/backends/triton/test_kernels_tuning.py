"""Tuning takes the fastest configuration, keeps it on disk by device and version, and only when it is asked."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from graphwright.backends.triton import tuning
from graphwright.backends.triton.cases import CASES
from graphwright.backends.triton.configurations import TABLE, Config, candidates, choose, take_tuned
from graphwright.backends.triton.launching import recorded
from graphwright.ir.errors import BackendError

CPU, META, NAME = torch.device("cpu"), torch.device("meta"), "attention 64"


@pytest.fixture(autouse=True)
def _nothing_tuned() -> Iterator[None]:
    yield
    for name in TABLE:
        take_tuned(name, 90, None)


def pretend(call: Callable[[], object]) -> float:
    """Milliseconds: the fewer warps the better, without running anything."""
    with recorded(dry=True, arch=90) as launches:
        call()
    return float(min(launch.config.blocks.get("BT", 0) for launch in launches if launch.name == "attention"))


def tuned(folder: Path) -> dict[str, Config]:
    return tuning.tune(META, only=[NAME], folder=folder, measure=pretend)


def test_the_fastest_is_taken_and_kept(tmp_path: Path) -> None:
    first, wanted = candidates(NAME, 90)[0], min(candidates(NAME, 90), key=lambda config: config.blocks["BT"])
    assert choose(NAME, 90) is first is not wanted
    assert tuned(tmp_path)[NAME] == wanted == choose(NAME, 90)
    take_tuned(NAME, 90, None)
    assert tuning.load_choices(META, tmp_path)[NAME] == wanted == choose(NAME, 90)
    (file,) = tmp_path.iterdir()
    assert file == tuning.choices_file(META, tmp_path)
    assert "triton" in file.name
    assert "graphwright" in file.name


def test_without_tuning_nothing_changes(tmp_path: Path) -> None:
    assert tuning.load_choices(CPU, tmp_path) == {}
    assert choose(NAME, 90) is candidates(NAME, 90)[0]


def test_an_architecture_takes_the_newest_entry_that_is_not_newer(tmp_path: Path) -> None:
    assert candidates(NAME, 86) == candidates(NAME, 80)
    assert candidates(NAME, 100) == candidates(NAME, 90) != candidates(NAME, 80)
    assert candidates(NAME, 942) != candidates(NAME, 90)


@pytest.mark.parametrize("content", ["{", '{"attention 64": {}}', '{"attention 64": []}', "[]"])
def test_a_damaged_file_is_an_error(tmp_path: Path, content: str) -> None:
    tuning.choices_file(CPU, tmp_path).write_text(content, encoding="utf-8")
    with pytest.raises(BackendError, match="is damaged"):
        tuning.load_choices(CPU, tmp_path)


def test_a_configuration_of_another_table_is_an_error(tmp_path: Path) -> None:
    content = {NAME: {"blocks": {"BQ": 1, "BT": 1}, "warps": 4, "stages": 1}}
    tuning.choices_file(CPU, tmp_path).write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(BackendError, match="configurations that the table has not: attention 64"):
        tuning.load_choices(CPU, tmp_path)


def test_a_file_that_cannot_be_written_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("", encoding="utf-8")
    with pytest.raises(BackendError, match="cannot be written"):
        tuned(blocked / "folder")
    assert list(tmp_path.iterdir()) == [blocked]


def test_every_entry_of_the_table_has_a_case() -> None:
    assert {case.table for case in CASES} - {None} == set(TABLE)
