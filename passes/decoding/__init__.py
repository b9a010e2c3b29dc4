"""Passes for decoding steps: less work for the rows and positions that a step brings."""

from graphwright.passes.decoding.bundle import PrepareDecoder
from graphwright.passes.decoding.flattening import UnflattenRows
from graphwright.passes.decoding.positions import TabulatePositions
from graphwright.passes.decoding.rows import HoistRowSelection

__all__ = ["HoistRowSelection", "PrepareDecoder", "TabulatePositions", "UnflattenRows"]
