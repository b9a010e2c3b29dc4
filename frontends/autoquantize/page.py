"""A search as one HTML page that needs nothing beside itself."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from graphwright.frontends.autoquantize.plotting import has_matplotlib, picture
from graphwright.passes.rendering.html import page, section

if TYPE_CHECKING:
    from graphwright.frontends.autoquantize.result import AutoQuantizeResult


def render(result: AutoQuantizeResult) -> str:
    """Message, plot, table of trials with their kernels, and the report of the best model."""
    from graphwright.frontends.autoquantize.result import HEADS

    head = "".join(f"<th>{escape(name)}</th>" for name in HEADS)
    rows = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in result.rows())
    parts = [
        f"<h1>{escape(result.message)}</h1>",
        _plot(result),
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>',
        _kernels(result),
        _errors(result),
        section(result.report) if result.report is not None else "",
    ]
    return page("graphwright search", "".join(parts))


def _plot(result: AutoQuantizeResult) -> str:
    if not has_matplotlib():
        return '<p class="note">matplotlib is not installed: no plot</p>'
    drawing = picture(result, "svg").decode("utf-8")
    return f'<div class="scroll">{drawing[drawing.index("<svg") :]}</div>'


def _kernels(result: AutoQuantizeResult) -> str:
    if result.trial is None or not result.trial.kernels:
        return ""
    words = ", ".join(f"{count} × {kernel}" for kernel, count in result.trial.kernels.items())
    return f"<p>its quantised linears run as: {escape(words)}</p>"


def _errors(result: AutoQuantizeResult) -> str:
    items = [f"<dt>{trial.index}</dt><dd>{escape(trial.error)}</dd>" for trial in result.trials if trial.error]
    return f"<details><summary>trials that failed</summary><dl>{''.join(items)}</dl></details>" if items else ""
