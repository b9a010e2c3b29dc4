"""The table of sensitivities: linears by candidates."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graphwright.ir.errors import InputError
from graphwright.passes.quantization.overrides import Override
from graphwright.passes.quantization.sensitivity.candidates import named


@dataclass(frozen=True)
class LinearSensitivity:
    """One weight, which linears may share or several may have been merged into.

    Attributes:
        weight: its name, which is what ``QuantizeLinears(overrides=...)`` takes.
        path: module path of the first linear that reads it.
        parameters: how many numbers it has.
        kurtosis: of the linear's inputs on the calibration data (3 for normal ones); ``None`` without data.
        values: the sensitivity to each candidate.
        stored: bytes with each candidate: codes, scales and zero points.
    """

    weight: str
    path: str
    parameters: int
    kurtosis: float | None
    values: tuple[float, ...]
    stored: tuple[int, ...]


@dataclass(frozen=True)
class Sensitivities:
    """What each candidate costs at each linear. Prints as a table; ``to_json`` and ``from_json`` keep it.

    Attributes:
        measure: what the values are, see :func:`graphwright.sensitivities`.
        candidates: options of a format as ``overrides`` takes them; ``None`` for floating point.
        linears: one row per weight, in the program's order.
    """

    measure: str
    candidates: tuple[Override, ...]
    linears: tuple[LinearSensitivity, ...]

    def names(self) -> tuple[str, ...]:
        """The candidates in words."""
        return tuple(named(candidate) for candidate in self.candidates)

    @property
    def parameters(self) -> int:
        """Of all linears together."""
        return sum(row.parameters for row in self.linears)

    def uniform(self) -> Sensitivities:
        """The same table with every parameter as sensitive as the average one: what sizes alone would tell."""
        totals = [sum(row.values[index] for row in self.linears) for index in range(len(self.candidates))]
        mean = [total / self.parameters for total in totals]
        rows = [
            dataclasses.replace(row, values=tuple(value * row.parameters for value in mean)) for row in self.linears
        ]
        return dataclasses.replace(self, measure=f"uniform {self.measure}", linears=tuple(rows))

    def total(self, candidate: int = 0) -> float:
        """The sum over all linears with one candidate."""
        return sum(row.values[candidate] for row in self.linears)

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        found: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return found

    def to_json(self, indent: int | None = 2) -> str:
        """The table as JSON text, which :meth:`from_json` reads back equal."""
        return json.dumps(self.as_dict(), indent=indent, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Sensitivities:
        """A table from what :meth:`to_json` wrote.

        Raises:
            InputError: it is something else.
        """
        try:
            data = json.loads(text)
            rows = tuple(
                LinearSensitivity(**{**row, "values": tuple(row["values"]), "stored": tuple(row["stored"])})
                for row in data["linears"]
            )
            found = cls(data["measure"], tuple(data["candidates"]), rows)
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"is no table of sensitivities: {error}", where="Sensitivities.from_json") from error
        if any(len(row.values) != len(found.candidates) for row in rows):
            raise InputError("has rows of another length than its candidates", where="Sensitivities.from_json")
        return found

    def __str__(self) -> str:
        from graphwright.passes.rendering.terminal import plain_text

        return plain_text(self.__rich__())

    def __rich__(self) -> Any:
        from graphwright.passes.rendering.terminal import columns

        has_inputs = any(row.kurtosis is not None for row in self.linears)
        heads = ["weight", "parameters", *(["kurtosis"] if has_inputs else []), *self.names()]
        title = f"sensitivity ({self.measure}) of {len(self.linears)} weights"
        return columns(title, heads, [self._cells(row, has_inputs) for row in self.linears], left=1)

    @staticmethod
    def _cells(row: LinearSensitivity, has_inputs: bool) -> Sequence[str]:
        shown = [] if not has_inputs else ["–" if row.kurtosis is None else f"{row.kurtosis:.1f}"]
        return [row.weight, str(row.parameters), *shown, *(f"{value:.3g}" for value in row.values)]


def plain(options: Override) -> dict[str, Any] | None:
    """Options of a candidate as JSON values."""
    return dict(options) if isinstance(options, Mapping) else None
