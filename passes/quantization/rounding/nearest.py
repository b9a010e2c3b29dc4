"""Rounding to the nearest code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graphwright.passes.quantization.rounding.base import Rounding


@dataclass(frozen=True)
class Nearest(Rounding):
    """Every weight to the nearest code of its group's grid ("RTN"), slice by slice."""

    method: ClassVar[str] = "nearest"
