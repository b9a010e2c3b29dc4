"""The journal of a search: what it is about, then every trial, one JSON line each, so that a killed search goes on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from graphwright.frontends.autoquantize.trials import Trial
from graphwright.ir.decoder import DecoderLayout
from graphwright.ir.errors import InputError
from graphwright.ir.program import Program
from graphwright.passes.calibration.batches import Batch, flatten

FILE, TABLE = "journal.jsonl", "sensitivities.json"
_FORMAT = 1
# Numbers of each weight that are read to tell models apart.
_SAMPLE = 4096
_BATCHES = 4


class Journal:
    """Trials by what was tried. Without a folder they are kept in memory alone.

    A line is written and synced as a whole; one that a kill has cut off is dropped when the journal is read.

    Args:
        folder: where it lies; made where there is none.
        problem: what the search is about; a journal of another problem is refused.

    Raises:
        InputError: the folder cannot be used, or its journal is damaged or of another problem.
    """

    def __init__(self, folder: Path | None, problem: Mapping[str, Any]) -> None:
        self.folder = folder
        self.original: dict[str, Any] | None = None
        self._trials: dict[str, Trial] = {}
        if folder is None:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot be made: {error.strerror}", where=f"journal {folder}") from error
        self._file = folder / FILE
        header = json.loads(json.dumps({"format": _FORMAT, **problem}))
        lines = self._read()
        if not lines:
            self._append(header)
            return
        different = sorted(key for key in header.keys() | lines[0].keys() if header.get(key) != lines[0].get(key))
        if different:
            raise InputError(
                f"is the journal of another problem: it differs in {', '.join(different)}",
                where=str(self._file),
                hint="choose another folder, or remove this one to start anew",
            )
        for line in lines[1:]:
            if "original" in line:
                self.original = line["original"]
            else:
                self._keep(Trial.from_dict(line))

    def find(self, choice: Mapping[str, Any]) -> Trial | None:
        """The trial of a choice, if there was one."""
        return self._trials.get(_key(choice))

    def add(self, trial: Trial) -> None:
        """Write a trial down."""
        self._keep(trial)
        self._append(trial.as_dict())

    def add_original(self, facts: Mapping[str, Any]) -> None:
        """Write down what the original scores."""
        self.original = dict(facts)
        self._append({"original": self.original})

    def read_table(self) -> str | None:
        """The table of sensitivities of the first run, so that later ones decide alike."""
        file = self.folder / TABLE if self.folder is not None else None
        return file.read_text(encoding="utf-8") if file is not None and file.is_file() else None

    def write_table(self, text: str) -> None:
        """Keep the table of sensitivities."""
        if self.folder is not None:
            part = self.folder / f".{TABLE}.part"
            part.write_text(text, encoding="utf-8")
            os.replace(part, self.folder / TABLE)

    def _keep(self, trial: Trial) -> None:
        self._trials[_key(trial.choice)] = trial

    def _append(self, value: Mapping[str, Any]) -> None:
        if self.folder is None:
            return
        line = (json.dumps(value, allow_nan=False) + "\n").encode("utf-8")
        handle = os.open(self._file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(handle, line)
            os.fsync(handle)
        finally:
            os.close(handle)

    def _read(self) -> list[dict[str, Any]]:
        if not self._file.is_file():
            return []
        data = self._file.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if whole != data:
            os.truncate(self._file, len(whole))
        try:
            lines = [json.loads(line) for line in whole.splitlines()]
            if not all(isinstance(line, dict) for line in lines):
                raise ValueError("a line is no object")
        except ValueError as error:
            raise InputError(f"is damaged: {error}", where=str(self._file), hint="remove it to start anew") from error
        return lines


def _key(choice: Mapping[str, Any]) -> str:
    return json.dumps(choice, sort_keys=True)


def digest_of_program(program: Program) -> str:
    """What tells a program from others: its text, and a sample of every weight."""
    found = hashlib.sha256(str(program).encode())
    for name, tensor in sorted(program.tensors().items()):
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, len(flat) // _SAMPLE)][:_SAMPLE]
        found.update(name.encode())
        _update(found, sample)
    return found.hexdigest()


def digest_of_batches(program: Program, batches: Iterable[Batch] | None) -> str:
    """What tells calibration data from other: the first batches."""
    found = hashlib.sha256(str(batches).encode())
    for index, batch in enumerate(batches or ()):
        if index == _BATCHES:
            break
        for tensor in flatten(program, batch, index, DecoderLayout.find(program))[0]:
            _update(found, tensor)
    return found.hexdigest()


def _update(found: Any, tensor: torch.Tensor) -> None:
    found.update(str((tensor.dtype, tuple(tensor.shape))).encode())
    found.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
