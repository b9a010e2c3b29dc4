"""What a pipeline did, pass by pass, as data. Rendering is in :mod:`graphwright.passes.rendering`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class PassRecord:
    """One row of the report.

    Attributes:
        name: kebab-case name of the pass.
        options: options that differ from the defaults.
        contract: ``exact``, ``approximate`` or ``retrain``.
        changed: whether the program changed.
        nodes_changed: nodes added, removed or with other operands.
        nodes_before, nodes_after: nodes in the graph.
        bytes_before, bytes_after: bytes of all weights.
        macs_before, macs_after: multiply-accumulates at the traced sizes.
        seconds: time of the pass itself.
        verify_seconds: time of the checks after it.
        local_error: error of the worst replaced value against the old one, in float64, relative to its root mean
            square: the largest difference for exact passes, the root mean square for others.
        local_where: node and module path of that value.
        outputs: per output, errors against the program before (``previous``) and the original (``original``).
        notes: what the pass says of itself.
        skipped: why nothing was verified, if so.
    """

    name: str
    options: Mapping[str, Any]
    contract: str
    changed: bool = False
    nodes_changed: int = 0
    nodes_before: int = 0
    nodes_after: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    macs_before: int = 0
    macs_after: int = 0
    seconds: float = 0.0
    verify_seconds: float = 0.0
    local_error: float | None = None
    local_where: str = ""
    outputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    skipped: str = ""

    def worst_output_error(self) -> float | None:
        """Largest relative error of any output against the original; ``None`` when not verified."""
        errors = [float(entry["original"]["relative"]) for entry in self.outputs.values() if "original" in entry]
        return max(errors, default=None)


@dataclass
class Report:
    """The report of one pipeline run.

    Attributes:
        title: the model's class.
        rows: one record per pass.
        total_seconds: wall time, checks included.
        rounding_error: the original's own rounding error in its native dtype, measured against float64.
    """

    title: str
    rows: list[PassRecord] = field(default_factory=list)
    total_seconds: float = 0.0
    rounding_error: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """JSON values; infinities and NaN as strings."""
        data: dict[str, Any] = _jsonable(asdict(self))
        return data

    def to_json(self, indent: int | None = 2) -> str:
        """The report as JSON text."""
        return json.dumps(self.as_dict(), indent=indent, allow_nan=False)

    def to_html(self) -> str:
        """The report as one self-contained HTML page."""
        from graphwright.passes.rendering.html import render

        return render(self)

    def __str__(self) -> str:
        from graphwright.passes.rendering.terminal import render_text

        return render_text(self)

    def __rich__(self) -> Any:
        from graphwright.passes.rendering.terminal import table

        return table(self)


def _jsonable(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    if isinstance(value, str | int | float | bool) or value is None:
        return value
    return str(value)
