"""Programs on disk: ``program.json`` beside ``model.safetensors``.

``program.json`` holds the text form of the program, line by line, and its journal; nothing in it is said twice. The
weights file holds each tensor once, under its name in the program. No pickle, no code; the modules that define the
types a program takes and returns are imported, as those of transformers are.

A save is atomic even where one stands already: new weights are written under a name of their own, then
``program.json`` is replaced in one step, which decides, and only then do the weights take their usual name. Whenever it
is interrupted, a load gives either the old program or the new one.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import fx

from graphwright.ir.errors import ProgramError, SerializationError
from graphwright.ir.literals import has_written_form
from graphwright.ir.names import target_name
from graphwright.ir.parser import parse
from graphwright.ir.program import JournalEntry, Program
from graphwright.ir.provenance import describe
from graphwright.ir.signature_text import describe_tree
from graphwright.ir.text import lines_around, print_program
from graphwright.ir.weights_file import WeightsFile, write_tensors

FORMAT = "graphwright program"
VERSION = 1
PROGRAM_FILE = "program.json"
WEIGHTS_FILE = "model.safetensors"


# -- saving ------------------------------------------------------------------------------------------------------------


def save(program: Program, path: str | os.PathLike[str]) -> None:
    """Write a program into a folder, made if need be. What else is in the folder stays.

    Raises:
        SerializationError: the program has something that cannot be stored, the folder holds another model, or it
            cannot be written (full, read-only, ...). A program saved there before is still whole, and nothing
            half-written is left.
    """
    folder = Path(path)
    _check_folder(folder)
    document = _document(program)
    with _errors_as_ours(folder), _folder(folder):
        old = _digest_named_in(folder)
        with _new_file(folder) as (file, unnamed):
            digest = document["weights"]["digest"] = write_tensors(file, program.tensors())
        named = folder / _name_of(digest)
        _place(unnamed, named)
        try:
            with _new_file(folder) as (file, unnamed):
                file.write((json.dumps(document, indent=1, allow_nan=False) + "\n").encode())
            _place(unnamed, folder / PROGRAM_FILE)  # the step that decides
        except BaseException:
            if digest != old:
                _remove(named)
            raise
        os.replace(named, folder / WEIGHTS_FILE)
        if old and old != digest:
            _remove(folder / _name_of(old))
        _sync_folder(folder)


def _check_folder(folder: Path) -> None:
    """Refuse a folder whose weights are not ours: a Hugging Face model has a file of the same name."""
    if (folder / WEIGHTS_FILE).exists() and not (folder / PROGRAM_FILE).exists():
        raise SerializationError(
            f"the folder holds a {WEIGHTS_FILE} that is not a saved program's, and saving would overwrite it",
            where=str(folder),
            hint="choose another folder",
        )


def _document(program: Program) -> dict[str, Any]:
    """``program.json`` without the digest of the weights."""
    try:
        for spec in (program.signature.in_spec, program.signature.out_spec):
            describe_tree(spec)
        for node in program.nodes:
            _check_writable(program, node)
        text = print_program(program)
    except ProgramError as error:
        raise SerializationError(error.what, where=error.where, hint=error.hint, context=error.context) from error
    return {
        "format": FORMAT,
        "version": VERSION,
        "torch": torch.__version__.partition("+")[0],
        "weights": {"file": WEIGHTS_FILE, "digest": "", "order": list(program.tensors())},
        "journal": [_entry(entry) for entry in program.journal],
        "records": _plain(program.records, "records"),
        "text": text.splitlines(),
    }


def _check_writable(program: Program, node: fx.Node) -> None:
    if node.op == "call_function":
        target_name(node.target)
    values = [node.args, node.kwargs, dict(program.signature.constants) if node.op == "output" else None]
    for value in values:
        if not has_written_form(value):
            raise ProgramError(
                "the node holds a value that has no written form",
                where=describe(node),
                hint="passes put nodes, numbers, text and dtypes into nodes, not objects",
                context=lines_around(program, node, 0),
            )


def _entry(entry: JournalEntry) -> dict[str, Any]:
    where = f"journal entry of {entry.pass_name!r}"
    return {
        "pass": entry.pass_name,
        "options": _plain(entry.options, where),
        "changed": entry.changed,
        "details": _plain(entry.details, where),
    }


def _plain(value: Any, where: str) -> Any:
    """JSON values; infinities and NaN, which JSON has not, as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item, where) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, where) for item in value]
    raise SerializationError(
        f"{value!r} is not a JSON value", where=where, hint="journals hold numbers, text and lists"
    )


def _name_of(digest: str) -> str:
    """Under which weights lie until the program that needs them is in place."""
    return f"model.{digest}.safetensors"


@contextlib.contextmanager
def _folder(folder: Path) -> Iterator[None]:
    """The folder for the length of a save; those made for it are removed again if it fails."""
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise


@contextlib.contextmanager
def _new_file(folder: Path) -> Iterator[tuple[BinaryIO, Path]]:
    """A file under a temporary name, on disk for good at the end; removed if the block raises."""
    path = folder / f".{secrets.token_hex(8)}.part"
    try:
        with path.open("xb") as file:
            yield file, path
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        _remove(path)
        raise


def _place(temporary: Path, final: Path) -> None:
    try:
        os.replace(temporary, final)
    except BaseException:
        _remove(temporary)
        raise


def _remove(*paths: Path) -> None:
    for path in paths:
        with contextlib.suppress(OSError):
            path.unlink()


def _sync_folder(folder: Path) -> None:
    """Make renames durable where the system lets a folder be synced."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def _errors_as_ours(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SerializationError(
            f"the program could not be saved: {error.strerror or error}",
            where=str(error.filename or folder),
            hint="free space or choose another folder; what was saved there before is untouched",
        ) from error


def _digest_named_in(folder: Path) -> str:
    """The digest of the weights that a program saved here before uses; empty if there is none."""
    try:
        return str(json.loads((folder / PROGRAM_FILE).read_text(encoding="utf-8"))["weights"]["digest"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


# -- loading -----------------------------------------------------------------------------------------------------------


def load(path: str | os.PathLike[str]) -> Program:
    """Read a program written by :func:`save`. Weights are mapped, not read: their bytes load when they are used.

    Raises:
        SerializationError: the folder or a file is missing, truncated, of another version or damaged, weights and text
            do not fit, or this installation lacks an operator or an output type that the program uses.
    """
    folder = Path(path)
    document = _read_document(folder)
    weights = _open_weights(folder, document)
    try:
        program = parse("\n".join(document["text"]), weights)
    except ProgramError as error:
        raise SerializationError(
            f"the program does not load: {error.what}",
            where=f"{folder / PROGRAM_FILE}, {error.where}" if error.where else str(folder / PROGRAM_FILE),
            hint=error.hint or "its files do not fit this version of graphwright or each other: save it again",
            context=error.context,
        ) from error
    tensors, order = program.tensors(), document["weights"]["order"]
    different = sorted({*map(str, order), *weights} ^ set(tensors))
    if different:
        raise SerializationError(
            f"the program and its weights file do not have the same weights; they differ in {', '.join(different[:5])}",
            where=str(weights.path),
            hint="copy both files of a save together",
        )
    program.bind_tensors({name: tensors[name] for name in order})
    program.journal = [
        JournalEntry(entry["pass"], entry["options"], entry["changed"], entry["details"])
        for entry in document["journal"]
    ]
    program.records = dict(document.get("records", {}))  # programs saved before there were any have none
    return program


def check_integrity(path: str | os.PathLike[str]) -> None:
    """Read all weights of a saved program and compare them with the digest taken when they were saved.

    Raises:
        SerializationError: the folder is not a saved program, or its weights have changed on disk.
    """
    folder = Path(path)
    weights = _open_weights(folder, _read_document(folder))
    if weights.computed_digest() != weights.digest:
        raise SerializationError(
            "the weights are not those that were saved: the file is damaged",
            where=str(weights.path),
            hint="copy it again from where it came from, or save the program again",
        )


def _read_document(folder: Path) -> dict[str, Any]:
    path = folder / PROGRAM_FILE
    where = str(path)
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.is_file() else "there is no such folder"
        raise SerializationError(what, where=str(folder), hint="Program.load takes the folder given to Program.save")
    if not path.is_file():
        raise SerializationError(
            f"the folder holds no {PROGRAM_FILE}, so it is no saved program",
            where=str(folder),
            hint="Program.load takes the folder given to Program.save; a Hugging Face model loads by load_huggingface",
        )
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SerializationError(
            f"the file cannot be read: {error}", where=where, hint="it is truncated or damaged: save the program again"
        ) from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise SerializationError("the file is not a graphwright program", where=where)
    if document.get("version") != VERSION:
        raise SerializationError(
            f"the file has format version {document.get('version')!r}, this graphwright reads version {VERSION}",
            where=where,
            hint="load it with the graphwright that wrote it, or a newer one",
        )
    _check_document(document, where)
    return document


def _check_document(document: dict[str, Any], where: str) -> None:
    weights, text, journal = document.get("weights"), document.get("text"), document.get("journal")
    well_formed = (
        isinstance(weights, dict)
        and isinstance(weights.get("file"), str)
        and Path(weights["file"]).name == weights["file"]
        and isinstance(weights.get("digest"), str)
        and isinstance(weights.get("order"), list)
        and isinstance(text, list)
        and all(isinstance(line, str) for line in text)
        and isinstance(journal, list)
        and isinstance(document.get("records", {}), dict)
        and all(isinstance(item, dict) and set(item) == {"pass", "options", "changed", "details"} for item in journal)
    )
    if not well_formed:
        raise SerializationError("the file lacks a part of a program", where=where, hint="save the program again")


def _open_weights(folder: Path, document: dict[str, Any]) -> WeightsFile:
    usual, digest = folder / document["weights"]["file"], document["weights"]["digest"]
    named = folder / _name_of(digest)
    if named.is_file():  # a save was interrupted after it had decided
        return WeightsFile(named)
    weights = WeightsFile(usual)
    if weights.digest != digest:
        raise SerializationError(
            f"the weights belong to another program than the {PROGRAM_FILE} beside them",
            where=str(usual),
            hint="copy both files of a save together",
        )
    return weights
