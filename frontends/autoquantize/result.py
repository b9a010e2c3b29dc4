"""What a search found."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graphwright.frontends.api import OptimizedModel
from graphwright.frontends.autoquantize.goals import Target
from graphwright.frontends.autoquantize.trials import Trial
from graphwright.frontends.recipes import Recipe, save_recipe
from graphwright.passes.rendering.cells import size
from graphwright.passes.report import Report


def pareto_front(trials: Sequence[Trial]) -> tuple[Trial, ...]:
    """Trials than which none is smaller and as good, or better and as small; by bytes."""
    judged = [trial for trial in trials if trial.loss is not None and trial.bytes is not None]
    front: list[Trial] = []
    for trial in sorted(judged, key=lambda each: (each.bytes, each.loss, each.index)):
        if not front or (trial.loss or 0.0) < (front[-1].loss or 0.0):
            front.append(trial)
    return tuple(front)


@dataclass
class AutoQuantizeResult:
    """What :func:`graphwright.auto_quantize` gives.

    Attributes:
        met: whether target and limits hold.
        message: in words, also what stands in the way.
        model: the best model; ``None`` where every trial failed.
        recipe: passes that make it, for :func:`graphwright.save_recipe`.
        trial: what it scored.
        trials: all of them, in order.
        target: what was to be reached.
        original: score, bytes and latency of the model before.
        report: what each pass did to the best model.
    """

    met: bool
    message: str
    model: OptimizedModel | None
    recipe: Recipe | None
    trial: Trial | None
    trials: tuple[Trial, ...]
    target: Target
    original: dict[str, Any] = field(default_factory=dict)
    report: Report | None = None

    @property
    def front(self) -> tuple[Trial, ...]:
        """The Pareto front of bytes and loss."""
        return pareto_front(self.trials)

    def rows(self) -> list[tuple[str, ...]]:
        """The table's cells, see :data:`HEADS`; the original first."""
        front = {trial.index for trial in self.front}
        first = ("", "original", _number(self.original.get("score")), "", size(int(self.original.get("bytes", 0))))
        found: list[tuple[str, ...]] = [(*first, _number(self.original.get("latency_ms")), "", "")]
        for trial in self.trials:
            marks = ("met" if trial.met else "", "front" if trial.index in front else "")
            chosen = "chosen" if self.trial is not None and trial.index == self.trial.index else ""
            words = ", ".join(filter(None, (*marks, chosen, "failed" if trial.error else "")))
            found.append(
                (
                    str(trial.index),
                    trial.label,
                    _number(trial.score),
                    self.target.shown(trial.loss) if trial.loss is not None else "–",
                    size(trial.bytes) if trial.bytes is not None else "–",
                    _number(trial.latency_ms),
                    f"{trial.seconds:.1f}",
                    words,
                )
            )
        return found

    def __str__(self) -> str:
        from graphwright.passes.rendering.terminal import plain_text

        return plain_text(self.__rich__())

    def __rich__(self) -> Any:
        from graphwright.passes.rendering.terminal import columns

        return columns(self.message, HEADS, self.rows(), left=2)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw loss over bytes into a PNG or SVG file.

        Raises:
            InputError: matplotlib is not installed, or the suffix is another one.
        """
        from graphwright.frontends.autoquantize.plotting import draw

        draw(self, Path(path))

    def to_html(self) -> str:
        """Table, plot and report of the best model as one page; without the plot where matplotlib is not installed."""
        from graphwright.frontends.autoquantize.page import render

        return render(self)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``search.html``, and where there is a recipe, ``recipe.toml``, into a folder.

        With matplotlib ``pareto.png`` and ``pareto.svg`` too.
        """
        from graphwright.frontends.autoquantize.plotting import has_matplotlib

        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        (place / "search.html").write_text(self.to_html(), encoding="utf-8")
        if self.recipe is not None:
            save_recipe(self.recipe, place / "recipe.toml")
        if has_matplotlib():
            self.plot(place / "pareto.png")
            self.plot(place / "pareto.svg")


HEADS = ("", "recipe", "score", "loss", "weights", "ms", "s", "")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.5g}"
