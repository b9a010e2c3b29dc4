"""Weights that are done, in a folder: a run that was killed goes on where it was.

``run.json`` says what the run was given; every finished weight is a safetensors file with a digest of its data, which
appears whole or not at all. A run is deterministic, so going on gives the same bits as not having been killed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import os
import secrets
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from graphwright.ir.errors import GraphwrightError, InputError, SerializationError
from graphwright.ir.mapped import release
from graphwright.ir.program import Program
from graphwright.ir.weights_file import WeightsFile, write_tensors

_RUN = "run.json"
_FORMAT = "graphwright quantisation checkpoint 1"
_RESULT = "graphwright.result"
# What of a weight is looked at to know it again: so many pieces of so many bytes, evenly spread. Weights that were
# trained further differ everywhere.
_PIECES, _PIECE = 16, 1 << 12

# key of a fingerprint -> how messages call it
_WORDS = {
    "version": "version of graphwright",
    "program": "program",
    "weights": "weights",
    "options": "options",
    "calibration": "calibration data",
}


class Checkpoint:
    """A folder of finished weights."""

    def __init__(self, folder: str | os.PathLike[str], fingerprint: Mapping[str, str], names: Sequence[str]) -> None:
        """Open the folder of a run, or begin one.

        Args:
            folder: made if it is not there.
            fingerprint: digests of all that the results depend on.
            names: of the weights.

        Raises:
            InputError: the folder holds another run's weights, or other files; says what differs.
            SerializationError: it cannot be written or read.
        """
        self.folder = Path(folder)
        self._places = {name: self.folder / f"weight-{index:05d}.safetensors" for index, name in enumerate(names)}
        present = self._open_run()
        if present is None:
            self._begin(dict(fingerprint))
            return
        changed = [word for key, word in _WORDS.items() if present.get(key) != fingerprint[key]]
        if changed:
            raise InputError(
                f"holds the weights of another run: its {' and '.join(changed)} differ",
                where=f"checkpoint {str(self.folder)!r}",
                hint="give the same things again (a loader that shuffles gives other data), or another folder",
            )

    def get(self, name: str) -> Any:
        """What was put under this name, or ``None``.

        A file that is damaged is not used: the weight is done again, and a warning says so.
        """
        path = self._places[name]
        if not path.is_file():
            return None
        try:
            file = WeightsFile(path)
            if file.digest != file.computed_digest():
                raise SerializationError("the data are not those that were written", where=str(path))
            document = json.loads(file.metadata[_RESULT])
            if document["name"] != name:
                raise SerializationError(f"holds {document['name']!r}, not {name!r}", where=str(path))
            return _built(document["value"], {key: file[key].clone() for key in file})
        except (GraphwrightError, KeyError, ValueError, TypeError, AttributeError, ImportError) as error:
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            warnings.warn(
                f"the checkpoint of weight {name!r} is damaged and is done again: {first}", UserWarning, stacklevel=2
            )
            return None

    def has(self, name: str) -> bool:
        """Whether there is a file of this name's result."""
        return self._places[name].is_file()

    def put(self, name: str, value: Any) -> None:
        """Keep a result: a dataclass of this package, of tensors, plain values and further ones.

        Raises:
            SerializationError: it cannot be written.
        """
        tensors: dict[str, torch.Tensor] = {}
        document = {"name": name, "value": _taken_apart(value, "value", tensors)}
        path = self._places[name]
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.part")
        try:
            with temporary.open("xb") as file:
                write_tensors(file, tensors, {_RESULT: json.dumps(document)})
            os.replace(temporary, path)
        except OSError as error:
            raise SerializationError(f"cannot be written: {error.strerror or error}", where=str(path)) from error
        finally:
            temporary.unlink(missing_ok=True)

    def _open_run(self) -> dict[str, Any] | None:
        path = self.folder / _RUN
        try:
            if not self.folder.exists() or (self.folder.is_dir() and not any(self.folder.iterdir())):
                return None
            document = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(
                f"is no checkpoint: its {_RUN} cannot be read ({type(error).__name__})",
                where=f"checkpoint {str(self.folder)!r}",
                hint="give an empty or new folder, or one of an earlier run",
            ) from error
        if not isinstance(document, dict) or document.get("format") != _FORMAT:
            raise InputError(
                f"is no checkpoint: its {_RUN} is of something else",
                where=f"checkpoint {str(self.folder)!r}",
                hint="give an empty or new folder, or one of an earlier run",
            )
        return document

    def _begin(self, fingerprint: dict[str, str]) -> None:
        path = self.folder / _RUN
        temporary = path.with_name(f".{_RUN}.{secrets.token_hex(6)}.part")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps({"format": _FORMAT, **fingerprint}, indent=2) + "\n", encoding="utf-8")
            os.replace(temporary, path)
        except OSError as error:
            raise SerializationError(
                f"cannot be written: {error.strerror or error}", where=f"checkpoint {str(self.folder)!r}"
            ) from error


def fingerprint_of(program: Program, options: str, calibration: str) -> dict[str, str]:
    """Digests of what a run's results depend on.

    Args:
        program: as it is before.
        options: all that was chosen, in words.
        calibration: digest of the calibration data.
    """
    weights = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(program.tensors().items()):
        weights.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        for piece in _pieces(tensor):
            weights.update(piece)
    return {
        "version": version("graphwright"),
        "program": _digest(str(program)),
        "weights": weights.hexdigest(),
        "options": _digest(options),
        "calibration": calibration,
    }


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _pieces(tensor: torch.Tensor) -> list[bytes]:
    # Pieces are cut before they are made contiguous: of a mapped weight little is read.
    whole = tensor.detach()
    flat = whole.view(-1) if whole.is_contiguous() else whole.reshape(-1)
    length = max(1, _PIECE // flat.element_size())
    last = max(0, len(flat) - length)
    starts = sorted({last * index // (_PIECES - 1) for index in range(_PIECES)})
    found = [flat[start : start + length].view(torch.uint8).numpy().tobytes() for start in starts]
    release(whole)
    return found


# -- results as JSON and tensors ---------------------------------------------------------------------------------------

_HOUSE = "graphwright.passes."


def _taken_apart(value: Any, place: str, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        tensors[place] = value
        return {"tensor": place}
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, tuple):
        return {"tuple": [_taken_apart(item, f"{place}.{index}", tensors) for index, item in enumerate(value)]}
    kind = type(value)
    if not dataclasses.is_dataclass(value) or not kind.__module__.startswith(_HOUSE):
        raise SerializationError(f"a checkpoint cannot hold a {kind.__name__}", where=place)
    fields = {
        item.name: _taken_apart(getattr(value, item.name), f"{place}.{item.name}", tensors)
        for item in dataclasses.fields(value)
    }
    return {"class": f"{kind.__module__}:{kind.__qualname__}", "fields": fields}


def _built(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "tuple" in value:
        return tuple(_built(item, tensors) for item in value["tuple"])
    module, _, name = value["class"].partition(":")
    if not module.startswith(_HOUSE):
        raise ValueError(f"{module} holds no results")
    kind = getattr(importlib.import_module(module), name)
    if not dataclasses.is_dataclass(kind):
        raise ValueError(f"{name} is no result")
    made: Any = kind
    return made(**{key: _built(item, tensors) for key, item in value["fields"].items()})
