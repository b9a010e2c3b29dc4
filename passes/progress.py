"""A progress bar for work that takes minutes: on a terminal, and nowhere else.

It goes to stderr when that is a terminal, and is off otherwise and by ``GRAPHWRIGHT_PROGRESS=0``. Work inside other
work adds a line to the same display.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

_SWITCH = "GRAPHWRIGHT_PROGRESS"


class Progress:
    """How far one piece of work is."""

    def __init__(self, display: Any, line: Any) -> None:
        self._display, self._line = display, line

    def now(self, detail: str) -> None:
        """Say what is being worked on, such as a module path."""
        if self._display is not None:
            self._display.update(self._line, detail=detail)

    def rename(self, what: str) -> None:
        """Say anew what is done."""
        if self._display is not None:
            self._display.update(self._line, description=what)

    def expect(self, total: int) -> None:
        """Say how much work there is, where it was not known at first."""
        if self._display is not None:
            self._display.update(self._line, total=total)

    def step(self, count: int = 1) -> None:
        """So much more is done."""
        if self._display is not None:
            self._display.advance(self._line, count)


_displays: list[Any] = []  # the one that is shown, if any


@contextlib.contextmanager
def progress(what: str, total: int | None = None) -> Iterator[Progress]:
    """Show how far the work inside the block is.

    Args:
        what: what is done, such as ``quantize-linears``.
        total: steps there are; ``None`` where that is not known.
    """
    if _displays:
        yield from _line(_displays[-1], what, total)
        return
    if not is_shown():
        yield Progress(None, None)
        return
    with _display() as display:
        _displays.append(display)
        try:
            yield from _line(display, what, total)
        finally:
            _displays.remove(display)


def is_shown() -> bool:
    """Whether there is a terminal to show progress on, and nobody has switched it off."""
    return os.environ.get(_SWITCH, "1") != "0" and sys.stderr.isatty()


def _line(display: Any, what: str, total: int | None) -> Iterator[Progress]:
    line = display.add_task(what, total=total, detail="")
    try:
        yield Progress(display, line)
    finally:
        display.remove_task(line)


def _display() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Display

    columns: list[Any] = [
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[detail]}"),
    ]
    return Display(*columns, console=Console(stderr=True), transient=True)
