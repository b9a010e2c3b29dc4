"""Recipes: pipelines written down in TOML.

::

    target = "reference"            # optional

    [verification]                  # optional; `verify = false` checks structure only
    fresh = 2

    [[pass]]
    name = "cleanup"

    [[pass]]
    name = "quantize-linears"
    bits = 4
    group_size = 32
    ignore = ["lm_head", "re:.*router"]

Options are the fields of the pass. A selection by several properties is a table: ``where = { op = "aten.linear" }``.
TOML has no null: an option that may be absent is switched off by ``"none"``. Calibration data stands in no file: a pass
that had some is written with ``calibration = "given"``, and whoever loads it gives the data.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graphwright.frontends.options import Locate, nearest, read_options, read_pass
from graphwright.frontends.toml import GIVEN, table_of, to_toml
from graphwright.ir.errors import InputError, RecipeError
from graphwright.passes.base import Pass
from graphwright.passes.calibration import CalibrationData
from graphwright.passes.pipeline import Pipeline
from graphwright.passes.verification import Verification

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_TOP_LEVEL = ("pass", "target", "verify", "verification")


@dataclass(frozen=True)
class Recipe:
    """A pipeline and how to run it.

    Attributes:
        passes: in the order in which they run.
        target: name of the backend, ``None`` for the caller's choice.
        verify: as :func:`graphwright.optimize` takes it.
    """

    passes: tuple[Pass, ...]
    target: str | None = None
    verify: bool | Verification = True


def load_recipe(path: str | os.PathLike[str], *, calibration: Iterable[Any] | None = None) -> Recipe:
    """Read a recipe file.

    Args:
        path: the file.
        calibration: data for the passes that say ``calibration = "given"``.

    Raises:
        RecipeError: it cannot be read, is not valid TOML, or names an unknown pass or option, or gives a value of the
            wrong type; says the file, the line and the nearest known spelling.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"the recipe cannot be read: {error}", where=str(file)) from error
    return parse_recipe(text, origin=str(file), calibration=calibration)


def parse_recipe(text: str, *, origin: str = "recipe", calibration: Iterable[Any] | None = None) -> Recipe:
    """A recipe from TOML text; ``origin`` names it in messages.

    Raises:
        RecipeError: see :func:`load_recipe`.
    """
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"not valid TOML: {error}", where=origin) from error
    place = _Places(text, origin)
    for key in data:
        if key not in _TOP_LEVEL:
            raise RecipeError(f"unknown key {key!r}", where=place.key(key), hint=nearest(key, _TOP_LEVEL))
    tables = data.get("pass", [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise RecipeError("passes are written as [[pass]] tables", where=place.key("pass"))
    if not tables:
        raise RecipeError("lists no pass", where=origin, hint='write [[pass]] and below it name = "..."')
    target = data.get("target")
    if target is not None and not isinstance(target, str):
        raise RecipeError(f"must be a string, not {target!r}", where=place.key("target"))
    passes = tuple(
        read_pass(_with_data(table, calibration, place.of_pass(index)), place.of_pass(index))
        for index, table in enumerate(tables)
    )
    return Recipe(passes, target, _verify_of(data, place))


def save_recipe(
    passes: Recipe | Pipeline | Sequence[Pass],
    path: str | os.PathLike[str],
    *,
    target: str | None = None,
    verify: bool | Verification = True,
) -> None:
    """Write a pipeline as a recipe file that :func:`load_recipe` reads back equal. All or nothing.

    Raises:
        RecipeError: an option is a function or of another kind TOML cannot hold, or the file cannot be written.
    """
    text = format_recipe(passes, target=target, verify=verify)
    file = Path(path)
    try:
        handle, name = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                stream.write(text)
            os.chmod(name, 0o644)
            os.replace(name, file)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
            raise
    except OSError as error:
        raise RecipeError(f"the recipe cannot be written: {error.strerror}", where=str(file)) from error


def format_recipe(
    passes: Recipe | Pipeline | Sequence[Pass], *, target: str | None = None, verify: bool | Verification = True
) -> str:
    """The TOML text of a recipe.

    Raises:
        RecipeError: an option cannot be written.
    """
    recipe = passes if isinstance(passes, Recipe) else Recipe(_opened(passes), target, verify)
    lines: list[str] = []
    if recipe.target is not None:
        lines.append(f"target = {to_toml(recipe.target, 'target')}")
    if recipe.verify is False:
        lines.append("verify = false")
    if isinstance(recipe.verify, Verification):
        lines.append("\n[verification]")
        lines += [
            f"{item.name} = {to_toml(getattr(recipe.verify, item.name), item.name)}"
            for item in dataclasses.fields(recipe.verify)
        ]
    for item in recipe.passes:
        lines.append("\n[[pass]]")
        lines += [f"{key} = {to_toml(value, f'{item.name}: {key}')}" for key, value in table_of(item).items()]
    return "\n".join(lines).lstrip("\n") + "\n"


def _opened(passes: Pipeline | Sequence[Pass]) -> tuple[Pass, ...]:
    """The passes of a plain pipeline; others are one pass, with its name."""
    if isinstance(passes, Pipeline):
        return passes.passes if type(passes) is Pipeline and not passes.fixed_point else (passes,)
    return tuple(passes)


def _with_data(table: Mapping[str, Any], calibration: Iterable[Any] | None, where: Locate) -> Mapping[str, Any]:
    """A pass with its calibration data in place of the word that stands for it."""
    if table.get("calibration") != GIVEN:
        return table
    if calibration is None:
        raise RecipeError(
            "needs calibration data, which no recipe holds",
            where=where("calibration"),
            hint="load it with load_recipe(path, calibration=[batch, ...])",
        )
    return {**table, "calibration": CalibrationData.of(calibration)}


# -- reading ---------------------------------------------------------------------------------------------------------


class _Places:
    """Lines of a recipe, for messages."""

    def __init__(self, text: str, origin: str) -> None:
        self.lines, self.origin = text.splitlines(), origin

    def key(self, key: str | None) -> str:
        """The line of a key or table at the top level, or under [verification]."""
        if key is None:
            return self.origin
        pattern = re.compile(rf"\s*(\[+\s*)?[\"']?{re.escape(key)}[\"']?\s*(=|\]|\.)")
        return self._at(next((number for number, line in enumerate(self.lines, 1) if pattern.match(line)), None))

    def option(self, index: int, key: str | None) -> str:
        """The line of an option in the pass table of this index; of the table when the key is not found."""
        starts = [number for number, line in enumerate(self.lines, 1) if re.match(r"\s*\[\[\s*pass\s*\]\]", line)]
        label = f"pass {index + 1}"
        if index >= len(starts):
            return f"{self.origin}, {label}"
        end = starts[index + 1] if index + 1 < len(starts) else len(self.lines) + 1
        found = starts[index]
        if key is not None:
            pattern = re.compile(rf"\s*[\"']?{re.escape(key)}[\"']?\s*[=.]")
            found = next((number for number in range(found, end) if pattern.match(self.lines[number - 1])), found)
        return f"{self._at(found)}, {label}"

    def of_pass(self, index: int) -> Locate:
        """Where the options of one pass stand."""
        return lambda key: self.option(index, key)

    def _at(self, line: int | None) -> str:
        return f"{self.origin}, line {line}" if line is not None else self.origin


def _verify_of(data: Mapping[str, Any], place: _Places) -> bool | Verification:
    verify, settings = data.get("verify", True), data.get("verification")
    if not isinstance(verify, bool):
        raise RecipeError(f"must be true or false, not {verify!r}", where=place.key("verify"))
    if settings is None:
        return verify
    if not isinstance(settings, dict):
        raise RecipeError("is a table: [verification]", where=place.key("verification"))
    if not verify:
        raise RecipeError("verification is switched off and set up as well", where=place.key("verify"))
    read_options(Verification, settings, place.key)
    try:
        return Verification(**settings)
    except InputError as error:
        raise RecipeError(error.what, where=f"{place.key('verification')}: {error.where}", hint=error.hint) from error
