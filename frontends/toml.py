"""Values in TOML. The standard library reads TOML and does not write it."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from typing import Any

from graphwright.frontends.options import CALIBRATION, FAMILIES, NONE
from graphwright.ir.errors import RecipeError
from graphwright.passes.base import Pass
from graphwright.passes.pipeline import Pipeline


def table_of(item: Pass) -> dict[str, Any]:
    """Name and options of a pass, as they are set rather than as they print."""
    table: dict[str, Any] = {"name": item.name}
    for option in item.options():
        if option != CALIBRATION:
            table[option] = getattr(item, option)
    return table


def needs_calibration(item: Pass) -> bool:
    """Whether calibration data was given to a pass, or to one inside it. It is no part of a recipe."""
    inner = item.passes if isinstance(item, Pipeline) else ()
    return getattr(item, CALIBRATION, None) is not None or any(map(needs_calibration, inner))


def to_toml(value: Any, where: str) -> str:
    """A value in TOML, on one line.

    Raises:
        RecipeError: TOML has no such value.
    """
    if value is None:
        return f'"{NONE}"'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else str(value)
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, Pass):
        return to_toml(table_of(value), where)
    family = next((each for each in FAMILIES if isinstance(value, each.base)), None)
    if family is not None:
        given = {family.key: getattr(value, family.key), **value.options()}
        return to_toml({key: entry for key, entry in given.items() if entry is not None}, where)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        given = {item.name: getattr(value, item.name) for item in dataclasses.fields(value)}
        return to_toml({key: entry for key, entry in given.items() if entry is not None}, where)
    if isinstance(value, Mapping):
        entries = (f"{_key(str(key))} = {to_toml(entry, where)}" for key, entry in value.items())
        return "{ " + ", ".join(entries) + " }" if value else "{}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(to_toml(entry, where) for entry in value) + "]"
    raise RecipeError(
        f"{value!r} cannot be written into a recipe",
        where=where,
        hint="use a glob or 're:<regex>' in place of a function" if callable(value) else None,
    )


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _text(key)


def _text(value: str) -> str:
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
