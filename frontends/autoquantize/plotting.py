"""Loss over bytes, drawn."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphwright.ir.errors import InputError

if TYPE_CHECKING:
    from graphwright.frontends.autoquantize.result import AutoQuantizeResult

_FORMATS = ("png", "svg")


def has_matplotlib() -> bool:
    """Whether plots can be drawn."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(result: AutoQuantizeResult, path: Path) -> None:
    """Write the plot into a file.

    Raises:
        InputError: matplotlib is not installed, or the suffix is neither ``.png`` nor ``.svg``.
    """
    form = path.suffix.lstrip(".").lower()
    if form not in _FORMATS:
        raise InputError("must end with .png or .svg", where=str(path))
    path.write_bytes(picture(result, form))


def picture(result: AutoQuantizeResult, form: str) -> bytes:
    """The plot in a format.

    Raises:
        InputError: matplotlib is not installed.
    """
    if not has_matplotlib():
        raise InputError("needs matplotlib", where="plot", hint="pip install 'graphwright[search]'")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.add_subplot()
    judged = [trial for trial in result.trials if trial.loss is not None and trial.bytes is not None]
    axes.scatter(*_points(judged), color="#9aa3ad", label="trials", zorder=2)
    front = list(result.front)
    axes.plot(*_points(front), color="#2f6fde", marker="o", label="Pareto front", zorder=3)
    if result.trial is not None and result.trial.loss is not None:
        axes.scatter(*_points([result.trial]), color="#d9480f", marker="*", s=160, label="chosen", zorder=4)
    for trial in front:
        place = ((trial.bytes or 0) / 1e6, trial.loss)
        axes.annotate(trial.label, place, xytext=(5, 5), textcoords="offset points", fontsize=7)
    axes.axhline(result.target.most, color="#2b8a3e", linestyle="--", linewidth=1, label="target")
    axes.set_xlabel("weights in MB")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    stream = io.BytesIO()
    figure.savefig(stream, format=form, dpi=130, metadata={"Date": None} if form == "svg" else None)
    return stream.getvalue()


def _points(trials: list[Any]) -> tuple[list[float], list[float]]:
    return [trial.bytes / 1e6 for trial in trials], [trial.loss for trial in trials]
