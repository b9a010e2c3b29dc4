"""The report as a table in the terminal."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from graphwright.passes.rendering.cells import COLUMNS, footnote, headline, row_cells
from graphwright.passes.report import Report

_WIDTH = 150


def table(report: Report) -> Table:
    """The table for a rich console."""
    result = Table(
        title=headline(report),
        caption=footnote(report),
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
    )
    for index, name in enumerate(COLUMNS):
        result.add_column(name, justify="left" if index < 2 else "right", no_wrap=True)
    for row in report.rows:
        result.add_row(*row_cells(row), style=None if row.changed else "dim")
    return result


def columns(title: str, heads: Sequence[str], rows: Iterable[Sequence[str]], *, left: int, caption: str = "") -> Table:
    """A table of text for a rich console; the first ``left`` columns are words, the others numbers."""
    result = Table(
        title=title, caption=caption or None, box=box.SIMPLE_HEAD, title_justify="left", caption_justify="left"
    )
    for index, name in enumerate(heads):
        result.add_column(name, justify="left" if index < left else "right", no_wrap=True)
    for row in rows:
        result.add_row(*row)
    return result


def render_text(report: Report) -> str:
    """The table as plain text, without colours."""
    return plain_text(table(report))


def plain_text(shown: Table) -> str:
    """Any table as plain text, without colours."""
    stream = io.StringIO()
    Console(file=stream, width=_WIDTH, color_system=None, legacy_windows=False).print(shown)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()).strip("\n")
