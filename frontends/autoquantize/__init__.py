"""AutoQuantize: from a measure of quality and a target to a recipe."""

from graphwright.frontends.autoquantize.goals import Absolute, Limits, Relative
from graphwright.frontends.autoquantize.result import AutoQuantizeResult
from graphwright.frontends.autoquantize.search import auto_quantize
from graphwright.frontends.autoquantize.space import SearchSpace
from graphwright.frontends.autoquantize.trials import Trial

__all__ = ["Absolute", "AutoQuantizeResult", "Limits", "Relative", "SearchSpace", "Trial", "auto_quantize"]
