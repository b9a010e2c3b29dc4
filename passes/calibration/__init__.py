"""Calibration: typical inputs, run through a program a stretch at a time, and what is learnt from them."""

from graphwright.ir.blocks import Block, blocks_of
from graphwright.passes.calibration.batches import Batch, CalibrationData
from graphwright.passes.calibration.statistics import Observed
from graphwright.passes.calibration.stream import Stream

__all__ = ["Batch", "Block", "CalibrationData", "Observed", "Stream", "blocks_of"]
