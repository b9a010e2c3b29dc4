"""Writing ONNX files: all or nothing, with weights in the file or beside it."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx_ir as ir

from graphwright.backends.onnx.model import BuiltModel
from graphwright.ir.errors import ExportError

# A protobuf message holds less than 2 GiB; the rest of the message needs a little of it.
INLINE_LIMIT = 2**31 - 2**24
# A full disk, a file size limit, a quota.
_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
# Smaller initialisers stay in the model file, where tools can read them.
_EXTERNAL_THRESHOLD = 1024


def check_target(path: Path) -> None:
    """Refuse a path that cannot be written, before any work is done.

    Raises:
        ExportError: the folder is missing or read-only, or the path is a folder.
    """
    if path.is_dir():
        raise ExportError("the path is a folder", where=str(path), hint=f"name a file in it: {path / 'model.onnx'}")
    _check_parent(path.parent)


def check_folder(path: Path, *, mark: str) -> None:
    """Refuse a folder that cannot be written, or that holds anything but an earlier export.

    Args:
        path: folder to write.
        mark: a file that every export has.

    Raises:
        ExportError: it is a file, or holds something else, or its own folder is missing or read-only.
    """
    _check_parent(path.parent)
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise ExportError("there is something that is not a folder", where=str(path), hint="choose another name")
    if path.is_dir() and any(path.iterdir()) and not (path / mark).is_file():
        raise ExportError(
            f"the folder holds other things: it has no {mark}", where=str(path), hint="choose an empty or a new folder"
        )


def _check_parent(folder: Path) -> None:
    if not folder.exists():
        raise ExportError("the folder does not exist", where=str(folder), hint="create it first")
    if not folder.is_dir():
        raise ExportError("is not a folder", where=str(folder))
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ExportError("the folder cannot be written", where=str(folder), hint="choose another folder")


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """A path for the file in a temporary folder beside its target, gone afterwards.

    Raises:
        ExportError: the folder cannot be made, or the disk is full.
    """
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise write_failure(path, error) from error
    try:
        yield folder / path.name
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write(built: BuiltModel, path: Path, *, external_data: bool | None) -> tuple[Path, ...]:
    """Write a model, and ``<name>.onnx.data`` beside it when its weights go there.

    Args:
        built: the model.
        path: file to write; its folder must exist.
        external_data: weights beside the file; ``None`` decides by size.

    Returns:
        the files written, the model last.

    Raises:
        ExportError: the disk is full, or a file cannot be written; or the weights are too large for one file.
    """
    size = built.weight_bytes
    external = size > INLINE_LIMIT if external_data is None else external_data
    if not external and size > INLINE_LIMIT:
        raise ExportError(
            f"weights of {size / 2**30:.1f} GiB do not fit into one ONNX file",
            where=str(path),
            hint="leave external_data out, or set it to True",
        )
    data = path.with_name(f"{path.name}.data")
    try:
        if external:
            ir.save(built.model, path, external_data=data.name, size_threshold_bytes=_EXTERNAL_THRESHOLD)
        else:
            ir.save(built.model, path)
        written = (data, path) if external and data.exists() else (path,)
        for each in written:
            _flush(each)
    except OSError as error:
        raise write_failure(path, error) from error
    return written


def publish(staged_files: tuple[Path, ...], path: Path) -> tuple[Path, ...]:
    """Move finished files to where they belong, the model last; a data file no longer needed is removed.

    Raises:
        ExportError: a file cannot be moved; files that stood there before stay as they were.
    """
    targets = tuple(path.with_name(each.name) for each in staged_files)
    aside: list[tuple[Path, Path]] = []
    try:
        for source, target in zip(staged_files, targets, strict=True):
            if target.exists():
                kept = source.with_name(f"{source.name}.previous")
                os.replace(target, kept)
                aside.append((kept, target))
            os.replace(source, target)
    except OSError as error:
        for source, target in zip(staged_files, targets, strict=True):
            if not source.exists() and target.exists():
                target.unlink()
        for kept, target in aside:
            os.replace(kept, target)
        raise write_failure(path, error) from error
    stale = path.with_name(f"{path.name}.data")
    if stale not in targets and aside:
        stale.unlink(missing_ok=True)
    return targets


def publish_folder(staged_folder: Path, path: Path) -> None:
    """Put a finished folder where it belongs; one that stands there is replaced.

    Raises:
        ExportError: it cannot be moved; what stood there before stays.
    """
    aside = staged_folder.with_name(f"{staged_folder.name}.previous")
    try:
        if path.exists():
            os.replace(path, aside)
        os.replace(staged_folder, path)
    except BaseException as error:
        if aside.exists() and not path.exists():
            os.replace(aside, path)
        if isinstance(error, OSError):
            raise write_failure(path, error) from error
        raise


def _flush(path: Path) -> None:
    """Make the system say now if the disk is full."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def write_failure(path: Path, error: OSError) -> ExportError:
    """The error for a file or folder that the system does not let us write."""
    reason = error.strerror or str(error)
    hint = "free some space or choose another disk" if error.errno in _FULL else None
    return ExportError(f"could not be written: {reason}", where=str(path), hint=hint)
