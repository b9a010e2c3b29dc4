"""AutoRound: fit the rounding of all linears of a block to what the block gives, by signed gradient descent.

Cheng, Zhang, Shen, Cai, He, Lv, Liu: Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs
(2023), algorithm 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from graphwright.ir.errors import InputError
from graphwright.passes.quantization.grids import TINY
from graphwright.passes.quantization.rounding.base import BlockRounding, BlockTask, Codes
from graphwright.passes.quantization.rounding.block_run import BlockRun
from graphwright.passes.quantization.rounding.gptq import gptq
from graphwright.passes.quantization.rounding.offsets import TrainedRounding

STARTS = ("nearest", "weighted", "gptq")
OPTIMIZERS = ("sign", "adam")


@dataclass(frozen=True)
class AutoRound(BlockRounding):
    """Offsets and ranges of all weights of a block, trained on the block's outputs (Cheng et al. 2023).

    A block's outputs are held against those of the program that was given, each relative to its size. Of the start,
    the best step and the last, the one stays whose outputs are nearest over all the calibration data, so the result is
    never worse there than the start. It is the same for the same seed, data, threads and machine. Every integer format
    is served, those for products with integer activations too; activations count as exact while weights are trained.

    Attributes:
        steps: of gradient descent for each block; 0 leaves the start as it is.
        tokens: rows that a step looks at: whole batches of the calibration data until there are as many. The paper
            takes 8 sequences; with sequences of 512 that is 4096, at about four times the time.
        learning_rate: of the offsets in the first step, falling to 0 on a line; ``None`` for ``1 / steps`` with signs,
            twice that with 2-bit weights (whose ranges have far to go), and twice that again with Adam.
        scale_learning_rate: of the ranges; ``None`` for ``learning_rate``.
        optimizer: ``"sign"``, the paper's, or ``"adam"`` (Kingma and Ba 2015).
        start: ``"nearest"``; ``"weighted"``: nearest, with ranges fitted for the inputs, by the mean square of each
            (where the format searches for the clip); ``"gptq"``: GPTQ's codes and ranges.
        reach: largest offset, in steps of the grid; 0.5 allows both neighbours of a weight, more allows others.
        seed: of the order in which batches are taken.
    """

    method: ClassVar[str] = "autoround"
    steps: int = 200
    tokens: int = 1024
    learning_rate: float | None = None
    scale_learning_rate: float | None = None
    optimizer: str = "sign"
    start: str = "nearest"
    reach: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        for option, least in (("steps", 0), ("tokens", 1), ("seed", 0)):
            value = getattr(self, option)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(f"must be an integer from {least} on, not {value!r}", where=f"autoround: {option}")
        for option in ("learning_rate", "scale_learning_rate", "reach"):
            value = getattr(self, option)
            if value is not None and not 0.0 < value <= 10.0:
                raise InputError(f"must be above 0 and at most 10, not {value!r}", where=f"autoround: {option}")
        for option, choices in (("optimizer", OPTIMIZERS), ("start", STARTS)):
            if getattr(self, option) not in choices:
                raise InputError(
                    f"must be one of {', '.join(map(repr, choices))}, not {getattr(self, option)!r}",
                    where=f"autoround: {option}",
                )

    def codes(self, task: BlockTask) -> dict[str, Codes]:
        """Codes by weight name.

        Raises:
            InputError: the block's outputs on the calibration data are not finite, or GPTQ finds no start.
        """
        run = BlockRun(task)
        weights = self._start(task, run)
        if self.steps and run.outputs:
            self._train(run, weights)
        return {name: weight.found() for name, weight in weights.items()}

    def _start(self, task: BlockTask, run: BlockRun) -> dict[str, TrainedRounding]:
        moments = run.moments(task.targets) if self.start != "nearest" else {}
        weights: dict[str, TrainedRounding] = {}
        for target in task.targets:
            name, form = str(target.weight.target), task.forms[str(target.weight.target)]
            matrix = task.rounded.weight(target.weight)
            matrix = matrix.t() if target.transposed else matrix
            weights[name] = TrainedRounding(matrix, form, importance=_importance(moments, name), reach=self.reach)
            if self.start == "gptq":
                try:
                    weights[name].start_from(gptq(matrix, moments[name], form))
                except InputError as error:
                    raise InputError(error.what, where=f"weight {name!r}", hint=error.hint) from error
        return weights

    def _train(self, run: BlockRun, weights: Mapping[str, TrainedRounding]) -> None:
        groups: list[tuple[list[torch.Tensor], float]] = []
        for weight in weights.values():
            rate = self.learning_rate or self._usual_rate(weight.form.bits)
            offsets, ranges = weight.parameters()
            groups += [(offsets, rate), (ranges, self.scale_learning_rate or rate)]
        descent = _Descent(groups, adam=self.optimizer == "adam")
        parameters = [each for group, _ in groups for each in group]
        start = best = [each.clone() for each in parameters]
        dense = {name: weight.dense() for name, weight in weights.items()}
        before = [run.loss(dense, [batch]) for batch in range(run.batches)]
        order, least = _in_turn(run.batches, self.seed), 1.0
        for step in range(self.steps):
            batches = self._batches(run, order)
            loss, grads = run.gradients(dense, batches)
            # Batches differ in how hard they are: what counts is how much better than the start it is on the same ones.
            loss /= max(sum(before[batch] for batch in batches), TINY)
            if loss < least:
                best, least = [each.clone() for each in parameters], loss
            for name, grad in grads.items():  # one by one: what lies between parameters and weight is large
                weights[name].backward(grad)
            descent.step(1.0 - step / self.steps)
            for name, weight in weights.items():
                weight.bound()
                dense[name] = weight.dense()
        # The loss of a step is that of its batches alone: what was best there and last, compared on all of them.
        last = [each.clone() for each in parameters]
        losses = {0: sum(before)}
        for index, candidate in enumerate((best, last), 1):
            _put(parameters, candidate)
            dense = {name: weight.dense() for name, weight in weights.items()}
            losses[index] = run.loss(dense, range(run.batches))
        _put(parameters, (start, best, last)[min(losses, key=lambda index: losses[index])])

    def _usual_rate(self, bits: int) -> float:
        return (2.0 if self.optimizer == "adam" else 1.0) * (2.0 if bits <= 2 else 1.0) / self.steps

    def _batches(self, run: BlockRun, order: Iterator[int]) -> list[int]:
        chosen = [next(order)]
        rows = run.rows(chosen[0])
        while rows < self.tokens and len(chosen) < run.batches:
            chosen.append(next(order))
            rows += run.rows(chosen[-1])
        return chosen


def _importance(moments: Mapping[str, torch.Tensor], name: str) -> torch.Tensor | None:
    if name not in moments:
        return None
    diagonal = moments[name].diagonal()
    return (diagonal / diagonal.mean().clamp_min(TINY)).clamp_min(1e-8)


def _put(parameters: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
    for each, value in zip(parameters, values, strict=True):
        each.copy_(value)


def _in_turn(count: int, seed: int) -> Iterator[int]:
    """All numbers below ``count`` in random order, again and again."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).tolist()


class _Descent:
    """Signed gradient descent, or Adam without its bias towards 0."""

    def __init__(self, groups: Sequence[tuple[list[torch.Tensor], float]], *, adam: bool) -> None:
        self._groups, self._adam, self._count = groups, adam, 0
        every = [each for parameters, _ in groups for each in parameters] if adam else []
        self._state = {id(each): (torch.zeros_like(each), torch.zeros_like(each)) for each in every}

    def step(self, factor: float) -> None:
        """Change the parameters by their gradients, which are used up."""
        self._count += 1
        for parameters, rate in self._groups:
            for each in parameters:
                if each.grad is not None:
                    each.sub_(self._direction(each, each.grad), alpha=rate * factor)
                    each.grad = None

    def _direction(self, parameter: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        if not self._adam:
            return grad.sign()
        first, second = self._state[id(parameter)]
        first.lerp_(grad, 0.1)
        second.lerp_(grad.square(), 0.01)
        corrected = (second / (1 - 0.99**self._count)).sqrt_().clamp_min_(1e-30)
        return first / (1 - 0.9**self._count) / corrected
