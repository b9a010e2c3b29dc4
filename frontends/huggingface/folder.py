"""A Hugging Face folder on disk, checked before anything is loaded from it."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graphwright.ir.errors import InputError

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json", "tf_model.h5", "model.ckpt", "flax_model.msgpack")
_HEADER_LIMIT = 100 << 20  # bytes; the format's own
# dtype -> bits of an element
_BITS = {"BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "C64": 64} | {
    f"{kind}{bits}": bits for kind in "FIU" for bits in (8, 16, 32, 64) if (kind, bits) != ("F", 8)
}
_BITS |= {"BF16": 16} | dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8)


@dataclass(frozen=True)
class ModelFolder:
    """A folder that holds a complete model.

    Attributes:
        path: the folder.
        config: the content of ``config.json``.
        shards: its weight files.
    """

    path: Path
    config: dict[str, Any]
    shards: tuple[Path, ...]

    @property
    def tokenizer_inputs(self) -> tuple[str, ...]:
        """What the folder's tokenizer says it produces; empty when it does not say."""
        path = self.path / "tokenizer_config.json"
        if not path.is_file():
            return ()
        names = _read_json(path).get("model_input_names", ())
        return tuple(str(name) for name in names)


def is_model_folder(path: Path) -> bool:
    """Whether a path looks like a Hugging Face model folder."""
    return (path / CONFIG).is_file()


def open_folder(path: str | os.PathLike[str]) -> ModelFolder:
    """Check a folder: its configuration, and every weight file from its header to its last byte.

    Raises:
        InputError: no such folder, not a model, weights missing, truncated or pickled; names the file and the tensor.
    """
    folder = Path(path)
    if not folder.exists():
        raise InputError(
            "there is no such folder",
            where=str(folder),
            hint="give a local folder; models are never downloaded (huggingface_hub can do that beforehand)",
        )
    if not folder.is_dir():
        raise InputError("is a file, not a model folder", where=str(folder), hint="give the folder it lies in")
    present = sorted(item.name for item in folder.iterdir())
    if CONFIG not in present:
        raise InputError(
            f"is not a model folder: it has no {CONFIG}",
            where=str(folder),
            hint=f"expected {CONFIG} and {SINGLE} (or shards with {INDEX}); found {_listing(present)}",
        )
    config = _read_json(folder / CONFIG)
    shards = _shards(folder, present)
    return ModelFolder(folder, config, shards)


def _listing(names: list[str]) -> str:
    if not names:
        return "an empty folder"
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"cannot be read as JSON: {error}", where=str(path)) from error
    if not isinstance(value, dict):
        raise InputError(f"should hold a JSON object, not a {type(value).__name__}", where=str(path))
    return value


def _shards(folder: Path, present: list[str]) -> tuple[Path, ...]:
    if INDEX in present:
        return _indexed_shards(folder)
    if SINGLE in present:
        tensor_names(folder / SINGLE)
        return (folder / SINGLE,)
    pickled = [name for name in present if name in _PICKLED]
    if pickled:
        raise InputError(
            f"has its weights in {pickled[0]} only, which is not read: unpickling can run any code",
            where=str(folder),
            hint=f"save it as {SINGLE} with model.save_pretrained(folder)",
        )
    raise InputError(
        f"has no weights: neither {SINGLE} nor {INDEX}",
        where=str(folder),
        hint=f"found {_listing(present)}",
    )


def _indexed_shards(folder: Path) -> tuple[Path, ...]:
    index = folder / INDEX
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError("has no 'weight_map'", where=str(index))
    held: dict[str, set[str]] = {}
    for tensor, file in weight_map.items():
        if file not in held:
            path = folder / str(file)
            if Path(str(file)).name != str(file) or not path.is_file():
                raise InputError(
                    f"names the weight file {file!r}, which is not there",
                    where=str(index),
                    hint=f"it should hold {tensor!r} among others; copy the missing file",
                )
            held[file] = tensor_names(path)
        if tensor not in held[file]:
            raise InputError(
                f"does not hold the tensor {tensor!r}, which {INDEX} says it does", where=str(folder / file)
            )
    return tuple(folder / file for file in held)


def tensor_names(path: Path) -> set[str]:
    """The tensors of a safetensors file, whose bytes are checked to be all there.

    Raises:
        InputError: not such a file, or truncated; names the first tensor that is cut off, or whose dtype is unknown or
            does not go with its size.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _HEADER_LIMIT):
                raise InputError(
                    "is not a safetensors file, or is cut off in its header",
                    where=f"{path} ({size} bytes)",
                    hint="copy the file again; a git-lfs pointer is a small text file and needs `git lfs pull`",
                )
            header = json.loads(file.read(length))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"cannot be read as safetensors: {error}", where=str(path)) from error
    header.pop("__metadata__", None)
    available = size - 8 - length
    for name, entry in header.items():
        _check_entry(path, name, entry)
    for name, entry in sorted(header.items(), key=lambda item: int(item[1]["data_offsets"][1])):
        end = int(entry["data_offsets"][1])
        if end > available:
            raise InputError(
                f"is truncated: the tensor {name!r} ends at byte {8 + length + end}, the file at {size}",
                where=str(path),
                hint="copy or download the file again",
            )
    return set(header)


def _check_entry(path: Path, name: str, entry: Any) -> None:
    """Check what a header says of one tensor."""
    try:
        dtype, (start, end) = str(entry["dtype"]), entry["data_offsets"]
        elements, size = math.prod(entry["shape"]), int(end) - int(start)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"cannot be read as safetensors: its header is damaged at {name!r}", where=str(path)
        ) from error
    if dtype not in _BITS:
        raise InputError(f"the tensor {name!r} has the dtype {dtype!r}, which is not known", where=str(path))
    if size * 8 != elements * _BITS[dtype]:
        raise InputError(
            f"the tensor {name!r} has {size} bytes, which is not {elements} elements of {dtype}",
            where=str(path),
            hint="the file is damaged, or was written by something that does not follow the format",
        )
