"""Recipes: pipelines written down in TOML.

::

    target = "reference"            # optional
    calibration = true              # optional: the passes were given calibration data, and are to be given some again

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
So is a rounding method with options: ``rounding = { method = "gptq", damping = 0.1 }``. TOML has no null: an option
that may be absent is switched off by ``"none"``. Calibration data is no part of a recipe: it is given to
:func:`load_recipe`, which hands it to the passes that can use it.
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

from graphwright.frontends.options import CALIBRATION, Locate, nearest, read_options, read_pass
from graphwright.frontends.toml import needs_calibration, table_of, to_toml
from graphwright.ir.errors import InputError, RecipeError
from graphwright.passes import registry
from graphwright.passes.base import Pass
from graphwright.passes.pipeline import Pipeline
from graphwright.passes.verification import Verification

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_TOP_LEVEL = ("pass", "target", "calibration", "verify", "verification")


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
        path: of the file.
        calibration: typical inputs, for all passes that can use them; see :class:`CalibrationData`.

    Raises:
        RecipeError: it cannot be read, is not valid TOML, or names an unknown pass or option, or gives a value of the
            wrong type; says the file, the line and the nearest known spelling. Or a pass needs calibration data and
            there is none, or there is some and no pass can use it.
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
    _check_calibration(data, place, calibration)
    users = [_calibrated(table, place.of_pass(index), calibration) for index, table in enumerate(tables)]
    passes = tuple(read_pass(table, place.of_pass(index)) for index, table in enumerate(tables))
    if calibration is not None and not any(users):
        raise RecipeError("there is calibration data, which no pass of the recipe can use", where=origin)
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
    if any(map(needs_calibration, recipe.passes)):
        lines.append("calibration = true")
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


# -- reading ---------------------------------------------------------------------------------------------------------


def _check_calibration(data: Mapping[str, Any], place: _Places, calibration: Iterable[Any] | None) -> None:
    wanted = data.get(CALIBRATION, False)
    hint = "give it to load_recipe(path, calibration=...), on the command line as --calibration FILE"
    if not isinstance(wanted, bool):
        raise RecipeError("calibration data is no part of a recipe", where=place.key(CALIBRATION), hint=hint)
    if wanted and calibration is None:
        raise RecipeError("the recipe was made with calibration data", where=place.key(CALIBRATION), hint=hint)


def _calibrated(table: dict[str, Any], where: Locate, data: Iterable[Any] | None) -> bool:
    """Hand calibration data to a pass, or to those inside it; whether one of them can use it."""
    if CALIBRATION in table:
        raise RecipeError(
            "calibration data is no part of a recipe",
            where=where(CALIBRATION),
            hint="give it to load_recipe(path, calibration=...), on the command line as --calibration FILE",
        )
    inner = table.get("passes", [])
    tables = [each for each in inner if isinstance(each, dict)] if isinstance(inner, list) else []
    users = [_calibrated(each, where, data) for each in tables]
    with contextlib.suppress(InputError):  # whoever reads the table says that there is no such pass
        kind = registry.get(str(table.get("name")))
        if any(item.name == CALIBRATION and item.init for item in dataclasses.fields(kind)):
            table.update({CALIBRATION: data} if data is not None else {})
            return True
    return any(users)


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
