"""One trial: a recipe, run, lowered, judged, timed, and the kernels that run its quantised linears."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree

from graphwright.frontends.api import OptimizedModel, optimize
from graphwright.ir.errors import GraphwrightError, InputError
from graphwright.ir.names import op_name
from graphwright.ir.program import Program
from graphwright.passes.base import Pass
from graphwright.passes.pipeline import weight_bytes

Evaluate = Callable[[Any], float]

# Seconds and calls of a measurement of latency.
_SECONDS, _MOST, _LEAST = 0.5, 30, 3
_QUANTIZED = "graphwright.linear_"


@dataclass(frozen=True)
class Trial:
    """What came of one recipe.

    Attributes:
        index: 1 for the first.
        choice: the recipe as JSON values.
        label: in words.
        score: what ``evaluate`` gave; ``None`` where the trial failed.
        loss: how much worse that is than the original's score.
        bytes: of all weights as stored.
        latency_ms: median of a call on the target.
        kernels: kernels of the quantised linears, with how many each runs.
        unproven: quantised linears that run in the reference, or that the target does not account for.
        met: target and limits hold.
        seconds: that the trial took.
        error: what went wrong.
    """

    index: int
    choice: Mapping[str, Any]
    label: str
    score: float | None = None
    loss: float | None = None
    bytes: int | None = None
    latency_ms: float | None = None
    kernels: Mapping[str, int] = field(default_factory=dict)
    unproven: Sequence[str] = ()
    met: bool = False
    seconds: float = 0.0
    error: str = ""

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {**dataclasses.asdict(self), "unproven": list(self.unproven)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Trial:
        """A trial from its JSON values.

        Raises:
            InputError: they are something else.
        """
        try:
            return cls(**values)
        except TypeError as error:
            raise InputError(f"holds a line that is no trial: {error}", where="journal") from error


@dataclass(frozen=True)
class Bench:
    """What all trials share.

    Attributes:
        program: the model with the passes that run before every recipe.
        examples: its example inputs, flat.
        timed: flat inputs of the call that is timed.
        target: what runs it.
        verify: as :func:`graphwright.optimize` takes it.
        evaluate: judges it.
    """

    program: Program
    examples: list[torch.Tensor]
    timed: list[torch.Tensor]
    target: Any
    verify: Any
    evaluate: Evaluate

    def lowered(self, passes: Sequence[Pass]) -> OptimizedModel:
        """The model after a recipe."""
        given = arguments_from(self.program, self.examples)
        return optimize(self.program, passes, example_inputs=given, target=self.target, verify=self.verify)

    def score(self, model: OptimizedModel) -> float:
        """What ``evaluate`` says of a model.

        Raises:
            InputError: it gives no finite number.
        """
        with torch.no_grad():
            found = self.evaluate(model)
        try:
            value = float(found)
        except (TypeError, ValueError) as error:
            raise InputError(f"must give a number, not {found!r}", where="evaluate") from error
        if not math.isfinite(value):
            raise InputError(f"gave {value}", where="evaluate")
        return value

    def measured(self, model: OptimizedModel) -> dict[str, Any]:
        """Score, bytes, latency and kernels of a model."""
        kernels, unproven = proof(model)
        return {
            "score": self.score(model),
            "bytes": weight_bytes(model),
            "latency_ms": latency(model, self.timed),
            "kernels": kernels,
            "unproven": unproven,
        }

    def run(self, index: int, choice: Mapping[str, Any], label: str, passes: Sequence[Pass]) -> tuple[Trial, Any]:
        """Try a recipe; whatever goes wrong stands in the trial.

        Returns:
            the trial, without loss, and the model; ``None`` where it failed.
        """
        start = time.perf_counter()
        try:
            model = self.lowered(passes)
            facts = self.measured(model)
        except GraphwrightError as error:
            return Trial(index, choice, label, seconds=time.perf_counter() - start, error=str(error)), None
        except Exception as error:  # the user's function may raise anything; the search goes on with other recipes
            words = f"{type(error).__name__}: {error}"
            return Trial(index, choice, label, seconds=time.perf_counter() - start, error=words), None
        return Trial(index, choice, label, **facts, seconds=time.perf_counter() - start), model


def arguments_from(program: Program, flat: Sequence[torch.Tensor]) -> tuple[Any, ...] | dict[str, Any]:
    """The arguments of a call from a program's flat inputs: by position, or by name where any was traced by name."""
    signature, values = program.signature, iter(flat)
    leaves = [
        signature.constants.get(index) if name is None else next(values) for index, name in enumerate(signature.inputs)
    ]
    args, kwargs = pytree.tree_unflatten(leaves, signature.in_spec)
    return {**dict(zip(signature.parameters, args)), **kwargs} if kwargs else tuple(args)


def latency(model: OptimizedModel, inputs: Sequence[torch.Tensor]) -> float:
    """Median milliseconds of a call."""
    times: list[float] = []
    with torch.no_grad():
        model._executable(*inputs)
        begin = time.perf_counter()
        while len(times) < _LEAST or (len(times) < _MOST and time.perf_counter() - begin < _SECONDS):
            start = time.perf_counter()
            model._executable(*inputs)
            times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def proof(model: OptimizedModel) -> tuple[dict[str, int], list[str]]:
    """The kernels of quantised linears with their numbers, and those linears that no kernel of the target runs."""
    wanted = {node.name for node in model.nodes if node.op == "call_function" and op_name(node).startswith(_QUANTIZED)}
    uses = {use.node: use for use in model.explain() if use.node in wanted}
    kernels = Counter(use.kernel for use in uses.values())
    inexact = [name for name in sorted(wanted) if name not in uses or uses[name].kernel == "reference"]
    return dict(kernels), inexact if model.target != "reference" else []
