"""A run of training in a folder, so that one that was killed goes on and ends with the same bits.

``run.json`` says what the run was given; ``step-00000100.safetensors`` holds what it had become after so many steps:
trained weights, the optimizer's state, random numbers, and the losses so far. Only the newest is kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from graphwright.ir.errors import InputError, SerializationError
from graphwright.ir.weights_file import WeightsFile, write_tensors

_RUN, _FORMAT, _STATE = "run.json", "graphwright training 1", "graphwright.state"
_WEIGHT, _OPTIMIZER, _RANDOM = "weight.", "optimizer.", "random"


class TrainingFolder:
    """The folder of one run.

    Args:
        folder: made if it is not there.
        fingerprint: what the run depends on, in words and digests.

    Raises:
        InputError: the folder holds another run, or other files; says what differs.
        SerializationError: it cannot be read or written.
    """

    def __init__(self, folder: str | os.PathLike[str], fingerprint: Mapping[str, str]) -> None:
        self.folder = Path(folder)
        present = self._present()
        if present is None:
            text = json.dumps({"format": _FORMAT, **fingerprint}, indent=2) + "\n"
            self._write(self.folder / _RUN, lambda file: file.write(text.encode()))
            return
        changed = [key for key, value in fingerprint.items() if present.get(key) != value]
        if changed:
            raise InputError(
                f"holds another run: its {' and '.join(changed)} differ",
                where=f"checkpoint {str(self.folder)!r}",
                hint="give student, teacher, data and options as they were when it began, or another folder",
            )

    def load(self, weights: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
        """Put the newest state back in place.

        Args:
            weights: what trains, by name; written into.
            optimizer: its state is replaced.

        Returns:
            ``step`` and what else was saved, or ``None`` when nothing was.

        Raises:
            SerializationError: the file is damaged.
        """
        found = sorted(self.folder.glob("step-*.safetensors"))
        if not found:
            return None
        file = WeightsFile(found[-1])
        if file.digest != file.computed_digest():
            raise SerializationError(
                "the data are not those that were written", where=str(found[-1]), hint="delete the file to start anew"
            )
        document: dict[str, Any] = json.loads(file.metadata[_STATE])
        with torch.no_grad():
            for name, tensor in weights.items():
                tensor.copy_(file[_WEIGHT + name])
        state: dict[int, dict[str, Any]] = {}
        for index, entries in document.pop("optimizer_state").items():
            state[int(index)] = {
                key: file[f"{_OPTIMIZER}{index}.{key}"].clone() if value is None else value
                for key, value in entries.items()
            }
        optimizer.load_state_dict({"state": state, "param_groups": document.pop("optimizer_groups")})
        torch.set_rng_state(file[_RANDOM].clone())
        return document

    def save(
        self, weights: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer, step: int, **more: Any
    ) -> None:
        """Write the state after a step, then let go of older ones.

        Raises:
            SerializationError: it cannot be written, or the optimizer keeps something that is no tensor or number.
        """
        tensors = {_WEIGHT + name: tensor.detach() for name, tensor in weights.items()}
        tensors[_RANDOM] = torch.get_rng_state()
        kept = optimizer.state_dict()
        entries: dict[str, dict[str, Any]] = {}
        for index, values in kept["state"].items():
            entries[str(index)] = own = {}
            for key, value in values.items():
                if isinstance(value, torch.Tensor):
                    tensors[f"{_OPTIMIZER}{index}.{key}"] = value
                own[key] = None if isinstance(value, torch.Tensor) else value
        document = {"step": step, **more, "optimizer_state": entries, "optimizer_groups": kept["param_groups"]}
        try:
            text = json.dumps(document)
        except TypeError as error:
            raise SerializationError(
                f"the state of {type(optimizer).__name__} cannot be written: {error}", where=str(self.folder)
            ) from error
        path = self.folder / f"step-{step:08d}.safetensors"
        older = sorted(self.folder.glob("step-*.safetensors"))
        self._write(path, lambda file: write_tensors(file, tensors, {_STATE: text}))
        for each in older:
            if each != path:
                each.unlink(missing_ok=True)

    def _present(self) -> dict[str, Any] | None:
        try:
            if not self.folder.exists() or (self.folder.is_dir() and not any(self.folder.iterdir())):
                return None
            document = json.loads((self.folder / _RUN).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            document = None
        if not isinstance(document, dict) or document.get("format") != _FORMAT:
            raise InputError(
                f"is no folder of a run: its {_RUN} is missing or of something else",
                where=f"checkpoint {str(self.folder)!r}",
                hint="give a new or empty folder, or one of an earlier run",
            )
        return document

    def _write(self, path: Path, write: Any) -> None:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.part")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with temporary.open("xb") as file:
                write(file)
            os.replace(temporary, path)
        except OSError as error:
            raise SerializationError(f"cannot be written: {error.strerror or error}", where=str(path)) from error
        finally:
            temporary.unlink(missing_ok=True)


def digest_of_batches(data: Sequence[Mapping[str, Any]]) -> str:
    """How many batches there are and what the first and the last hold."""
    found = hashlib.blake2b(str(len(data)).encode(), digest_size=16)
    for batch in (data[0], data[len(data) - 1]):
        for key, value in sorted(batch.items()):
            shown = value.detach().cpu().contiguous() if isinstance(value, torch.Tensor) else None
            found.update(f"{key} {value if shown is None else (shown.dtype, list(shown.shape))}".encode())
            if shown is not None and shown.numel():
                found.update(shown.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
