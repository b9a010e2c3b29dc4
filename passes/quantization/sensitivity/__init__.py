"""How much each linear minds being quantised."""

from graphwright.passes.quantization.sensitivity.kurtosis import skip_by_kurtosis
from graphwright.passes.quantization.sensitivity.measuring import MEASURES, sensitivities
from graphwright.passes.quantization.sensitivity.table import LinearSensitivity, Sensitivities

__all__ = ["MEASURES", "LinearSensitivity", "Sensitivities", "sensitivities", "skip_by_kurtosis"]
