"""Writing a model folder: weights in shards, and all of it or nothing."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from graphwright.frontends.huggingface.folder import INDEX, SINGLE
from graphwright.ir.errors import ExportError
from graphwright.ir.weights_file import write_tensors


def check_folder(path: Path, *, mark: str) -> None:
    """Refuse a folder that cannot be written, or that holds other things.

    Args:
        path: to be written.
        mark: a file that every export has.

    Raises:
        ExportError: it is a file, holds something else than an earlier export, or lies in no folder.
    """
    if not path.parent.is_dir():
        raise ExportError("the folder does not exist", where=str(path.parent), hint="create it first")
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise ExportError("there is something that is not a folder", where=str(path), hint="choose another name")
    if path.is_dir() and any(path.iterdir()) and not _is_export(path / mark):
        raise ExportError(
            "the folder holds other things than an earlier export", where=str(path), hint="choose an empty or a new one"
        )


def _is_export(mark: Path) -> bool:
    """Whether a model's configuration says that it is quantised: an original is never overwritten."""
    try:
        return mark.is_file() and "quantization_config" in json.loads(mark.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


@contextlib.contextmanager
def published(path: Path) -> Iterator[Path]:
    """A folder to be filled, which takes its place at the end of the block, or is gone if that raises.

    Raises:
        ExportError: the system does not let it be written; what stood there before stays.
    """
    try:
        staging = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise _failure(path, error) from error
    try:
        # mkdtemp's own folder is private; what is published has the permissions that the user's folders have.
        made, aside = staging / path.name, staging / "previous"
        made.mkdir()
        yield made
        if path.exists():
            os.replace(path, aside)
        try:
            os.replace(made, path)
        except BaseException:
            if aside.exists():
                os.replace(aside, path)
            raise
    except OSError as error:
        raise _failure(path, error) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _failure(path: Path, error: OSError) -> ExportError:
    return ExportError(
        f"could not be written: {error.strerror or error}", where=str(path), hint="is there space, and permission?"
    )


def write_shards(
    folder: Path, makers: Sequence[Callable[[], Mapping[str, torch.Tensor]]], limit: int
) -> tuple[list[int], Counter[torch.dtype]]:
    """Write tensors into as many files as it takes, with an index when there are several.

    Args:
        folder: to write into.
        makers: each makes a few tensors by name; only those of one file are in memory at a time.
        limit: bytes of tensors in a file; a single tensor may be larger.

    Returns:
        the sizes of the files, and how many numbers of each dtype they hold.
    """
    names: dict[str, int] = {}
    parts: list[Path] = []
    sizes: list[int] = []
    dtypes: Counter[torch.dtype] = Counter()
    pending: dict[str, torch.Tensor] = {}

    def write() -> None:
        part = folder / f"part-{len(parts)}"
        with part.open("wb") as file:
            write_tensors(file, pending)
            file.flush()
            os.fsync(file.fileno())
        names.update(dict.fromkeys(pending, len(parts)))
        parts.append(part)
        sizes.append(part.stat().st_size)
        pending.clear()

    for make in makers:
        for name, tensor in make().items():
            if pending and sum(_bytes(each) for each in pending.values()) + _bytes(tensor) > limit:
                write()
            pending[name] = tensor
            dtypes[tensor.dtype] += tensor.numel()
    if pending:
        write()
    if len(parts) == 1:
        parts[0].rename(folder / SINGLE)
        return sizes, dtypes
    files = [f"model-{index + 1:05}-of-{len(parts):05}.safetensors" for index in range(len(parts))]
    for part, file in zip(parts, files, strict=True):
        part.rename(folder / file)
    index = {"metadata": {"total_size": sum(sizes)}, "weight_map": {name: files[at] for name, at in names.items()}}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return sizes, dtypes


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
