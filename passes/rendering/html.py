"""The report as one HTML page that needs nothing beside itself."""

from __future__ import annotations

from html import escape

from graphwright.passes.rendering.cells import COLUMNS, details, footnote, headline, row_cells, size
from graphwright.passes.report import PassRecord, Report

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; --accent: #2f6fde; --text: #1b1f24; --page: #fff; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e8eb; --page: #15181c; --accent: #6ea0ff; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page); margin: 2rem auto;
  max-width: 76rem; padding: 0 1rem; }
h1 { font-size: 1.4rem; margin-bottom: .2rem; } p.note { opacity: .75; margin-top: .2rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left; } tr.still { opacity: .55; }
td.more { text-align: left; white-space: normal; background: var(--soft); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; margin: .3rem 0; }
dt { opacity: .75; } dd { margin: 0; overflow-wrap: anywhere; }
.bar { height: .55rem; background: var(--soft); border-radius: 3px; margin: .2rem 0 .8rem; }
.bar i { display: block; height: 100%; background: var(--accent); border-radius: 3px; } .scroll { overflow-x: auto; }
details > summary { cursor: pointer; }
"""


def render(report: Report) -> str:
    """The whole page."""
    return page(f"{report.title} – graphwright report", section(report))


def page(title: str, body: str) -> str:
    """A page around HTML text."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>{body}</body></html>\n"
    )


def section(report: Report) -> str:
    """Headline, bars and table of a report."""
    head = "".join(f"<th>{escape(name)}</th>" for name in COLUMNS)
    body = "".join(_row(row) for row in report.rows)
    return (
        f'<h1>{escape(headline(report))}</h1><p class="note">{escape(footnote(report))}</p>{_bars(report)}'
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _bars(report: Report) -> str:
    if not report.rows or not report.rows[0].bytes_before:
        return ""
    before, after = report.rows[0].bytes_before, report.rows[-1].bytes_after
    share = min(100.0, 100.0 * after / before)
    return (
        f'<div>weights before: {size(before)}</div><div class="bar"><i style="width:100%"></i></div>'
        f"<div>weights after: {size(after)} ({share:.1f} %)</div>"
        f'<div class="bar"><i style="width:{share:.2f}%"></i></div>'
    )


def _row(row: PassRecord) -> str:
    cells = "".join(f"<td>{escape(cell)}</td>" for cell in row_cells(row))
    line = f'<tr class="{"" if row.changed else "still"}">{cells}</tr>'
    more = details(row)
    worst = row.notes.get("worst_values") or []
    if not row.changed or not (more or worst):
        return line
    items = "".join(f"<dt>{escape(label)}</dt><dd>{escape(text)}</dd>" for label, text in more)
    layers = "".join(f"<dt>{escape(_place(entry))}</dt><dd>{escape(_error(entry))}</dd>" for entry in worst)
    values = f"<details><summary>values that moved most</summary><dl>{layers}</dl></details>" if layers else ""
    inner = f"<details><summary>{escape(row.name)}: details</summary><dl>{items}</dl>{values}</details>"
    return f'{line}<tr><td class="more" colspan="{len(COLUMNS)}">{inner}</td></tr>'


def _place(entry: dict[str, object]) -> str:
    return str(entry.get("path") or f"%{entry.get('node')}")


def _error(entry: dict[str, object]) -> str:
    relative, sqnr = entry.get("relative"), entry.get("sqnr_db")
    shown = f"{relative:.2e}" if isinstance(relative, float) else str(relative)
    return f"relative error {shown}, SQNR {sqnr:.1f} dB" if isinstance(sqnr, float) else f"relative error {shown}"
