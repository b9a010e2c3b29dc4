"""The report's cells as text, the same in every rendering."""

from __future__ import annotations

from collections.abc import Mapping

from graphwright.passes.report import PassRecord, Report

COLUMNS = ("pass", "contract", "nodes", "local error", "output error", "weights", "MACs", "run s", "check s")


def row_cells(row: PassRecord) -> tuple[str, ...]:
    """One row of the table, in the order of :data:`COLUMNS`."""
    return (
        row.name,
        row.contract,
        str(row.nodes_changed) if row.changed else "–",
        error(row.local_error) if row.changed else "",
        error(row.worst_output_error()) if row.changed else "",
        arrow(size(row.bytes_before), size(row.bytes_after)) if row.changed else size(row.bytes_after),
        arrow(count(row.macs_before), count(row.macs_after)) if row.changed else count(row.macs_after),
        f"{row.seconds:.2f}",
        f"{row.verify_seconds:.2f}",
    )


def headline(report: Report) -> str:
    """One line on the whole run."""
    if not report.rows:
        return f"{report.title}: no passes"
    first, last = report.rows[0], report.rows[-1]
    changed = sum(row.changed for row in report.rows)
    ratio = f" ({last.bytes_after / first.bytes_before:.1%})" if first.bytes_before else ""
    return (
        f"{report.title}: {changed} of {len(report.rows)} passes changed it, "
        f"weights {size(first.bytes_before)} → {size(last.bytes_after)}{ratio}, {report.total_seconds:.1f} s"
    )


def footnote(report: Report) -> str:
    """What the error columns mean."""
    if report.rounding_error is None:
        return "not verified numerically"
    return (
        "local error: of the worst replaced value, in float64, relative (largest difference for exact passes, root "
        "mean square for others); output error: of the worst output against the original, relative root mean square; "
        f"the original's own rounding error is {report.rounding_error:.1e}"
    )


def error(value: float | None) -> str:
    """An error with two digits."""
    if value is None:
        return "–"
    return "0" if value == 0 else f"{value:.1e}"


def arrow(before: str, after: str) -> str:
    """``a → b``, or ``a`` when nothing changed."""
    return before if before == after else f"{before} → {after}"


def size(number: int) -> str:
    """Bytes in decimal units."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if number >= factor:
            return f"{number / factor:.1f} {unit}"
    return f"{number} B"


def count(number: int) -> str:
    """A count in decimal units."""
    for unit, factor in (("T", 10**12), ("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= factor:
            return f"{number / factor:.1f} {unit}"
    return str(number)


def details(row: PassRecord) -> list[tuple[str, str]]:
    """What else there is to say of a pass, label and text."""
    found: list[tuple[str, str]] = []
    if row.options:
        found.append(("options", ", ".join(f"{key}={value!r}" for key, value in row.options.items())))
    if row.local_where and row.local_error:
        found.append(("largest local error", row.local_where))
    for name, entry in row.outputs.items():
        original = entry.get("original", {})
        relative, cosine, sqnr = (original.get(key) for key in ("relative", "cosine", "sqnr_db"))
        text = f"relative error {_number(relative)}, cosine {_number(cosine, 6)}, SQNR {_number(sqnr, 1)} dB"
        if "logits" in entry:
            text += f", KL {entry['logits']['kl']:.2e} nats, top-1 agreement {entry['logits']['top1_agreement']:.1%}"
        found.append((f"output {name}", text))
    for key, value in row.notes.items():
        if key != "worst_values" and not isinstance(value, Mapping):  # tables of numbers are for the JSON form
            found.append((key.replace("_", " "), _short(value)))
    return found


def _number(value: object, digits: int | None = None) -> str:
    if isinstance(value, float):
        return f"{value:.{digits}f}" if digits is not None else f"{value:.2e}"
    return str(value)


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 200 else text[:197] + "…"
