"""What commands print and write: progress on a terminal, folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphwright.ir.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from graphwright.passes.hooks import Hook


# A folder that holds one of these was written by this program.
_OURS = ("program.json", "decoder.json")


def console() -> Console:
    """Where tables go: as wide as they need where the output is no terminal, so that nothing is cut."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=160, color_system=None)


def _terminal() -> bool:
    from graphwright.passes.progress import is_shown

    return is_shown()


@contextlib.contextmanager
def working(what: str, *, quiet: bool = False) -> Iterator[None]:
    """A spinner on the terminal for work of unknown length."""
    if quiet or not _terminal():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(f"{what} …"):
        yield


@contextlib.contextmanager
def pass_progress() -> Iterator[list[Hook]]:
    """Hooks that draw a progress bar over the passes; none where progress is not shown."""
    if not _terminal():
        yield []
        return
    from graphwright.passes.hooks import Hook
    from graphwright.passes.progress import progress

    with progress("starting") as shown:

        class Bar(Hook):
            """Moves the bar."""

            def started(self, program: Any, passes: Sequence[Any]) -> None:
                shown.expect(len(passes))

            def before_pass(self, program: Any, item: Any) -> None:
                shown.rename(item.name)

            def after_pass(self, program: Any, item: Any, before: Any, record: Any) -> None:
                shown.step()

        yield [Bar()]


def check_new_folder(folder: Path, *, force: bool) -> None:
    """Check early that a result can be written there, before minutes of work.

    Raises:
        InputError: something stands there that may not be replaced, or the place cannot be written to.
    """
    if folder.exists() or folder.is_symlink():
        if not folder.is_dir():
            raise InputError("is a file; the result is a folder", where=str(folder), hint="choose another -o")
        if any(folder.iterdir()):
            if not force:
                raise InputError("exists and is not empty", where=str(folder), hint="choose another -o, or add --force")
            if not any((folder / name).is_file() for name in _OURS):
                raise InputError("is not a saved Program; it is not replaced", where=str(folder))
    parent = folder.absolute().parent
    if not parent.is_dir():
        raise InputError("there is no such folder", where=str(parent), hint="make it first, or choose another -o")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError("may not be written to", where=str(parent), hint="choose another -o")


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside ``folder`` that takes its place when the block ends well, and is removed otherwise."""
    folder = folder.absolute()
    staged = folder.parent / f".{folder.name}.{secrets.token_hex(6)}.part"
    staged.mkdir()
    try:
        yield staged
        _take_place(staged, folder)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise


def _take_place(staged: Path, folder: Path) -> None:
    if not folder.exists():
        os.replace(staged, folder)
        return
    old = folder.parent / f".{folder.name}.{secrets.token_hex(6)}.old"
    os.replace(folder, old)
    try:
        os.replace(staged, folder)
    except BaseException:
        os.replace(old, folder)
        raise
    shutil.rmtree(old)


def parse_sizes(text: str | None) -> dict[str, int]:
    """``batch=1,sequence=128`` as sizes.

    Raises:
        InputError: it is written otherwise.
    """
    sizes: dict[str, int] = {}
    for part in filter(None, (text or "").split(",")):
        name, _, size = part.partition("=")
        if not name.strip().isidentifier() or not size.strip().isdigit():
            raise InputError(f"{part!r} is not a size", where="option --at", hint="write --at batch=1,sequence=128")
        sizes[name.strip()] = int(size)
    return sizes
