"""Values in TOML. The standard library reads TOML and does not write it."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from typing import Any

from graphwright.frontends.options import NONE
from graphwright.ir.errors import RecipeError
from graphwright.passes.base import Pass
from graphwright.passes.calibration import CalibrationData

# Stands for calibration data, which is in no file.
GIVEN = "given"


def table_of(item: Pass) -> dict[str, Any]:
    """Name and options of a pass, as they are set rather than as they print."""
    table: dict[str, Any] = {"name": item.name}
    for option in item.options():
        value = getattr(item, option)
        table[option] = GIVEN if isinstance(value, CalibrationData) else value
    return table


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
