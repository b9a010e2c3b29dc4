"""AutoRound: fit the rounding of all linears of a block to what the block gives, by signed gradient descent.

Cheng, Zhang, Shen, Cai, He, Lv, Liu: Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs
(2023), algorithm 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from graphwright.ir.errors import InputError
from graphwright.passes.calibration.stream import run_nodes
from graphwright.passes.quantization.grids import TINY
from graphwright.passes.quantization.rounding.base import BlockRounding, BlockTask, Codes
from graphwright.passes.quantization.rounding.gptq import gptq
from graphwright.passes.quantization.rounding.offsets import TrainedRounding
from graphwright.passes.quantization.targets import LinearTarget

STARTS = ("nearest", "gptq")
OPTIMIZERS = ("sign", "adam")


@dataclass(frozen=True)
class AutoRound(BlockRounding):
    """Offsets and ranges of all weights of a block, trained on the block's outputs (Cheng et al. 2023).

    The inputs of a block are what the rounded blocks before it give; its outputs are held against those of the program
    that was given. Results are the same for the same seed, data and machine.

    Attributes:
        steps: of gradient descent for each block; 0 leaves the start as it is.
        tokens: rows that a step looks at: whole batches of the calibration data until there are as many.
        learning_rate: of the offsets in the first step, falling to 0 on a line; ``None`` for ``1 / steps`` with signs
            and for ``2 / steps`` with Adam.
        scale_learning_rate: of the ranges; ``None`` for ``learning_rate``.
        optimizer: ``"sign"``, the paper's, or ``"adam"`` (Kingma and Ba 2015).
        start: ``"nearest"``, or ``"gptq"``: from GPTQ's codes, with ranges fitted for the inputs.
        reach: largest offset, in steps of the grid; 0.5 allows both neighbours of a weight, more allows others.
        seed: of the order in which batches are taken.
    """

    method: ClassVar[str] = "autoround"
    steps: int = 200
    tokens: int = 4096
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
        stretch = _Stretch(task)
        weights = self._start(task, stretch)
        if self.steps and stretch.outputs:
            self._train(stretch, weights)
        return {name: weight.found() for name, weight in weights.items()}

    def _start(self, task: BlockTask, stretch: _Stretch) -> dict[str, TrainedRounding]:
        moments = stretch.moments(task.targets) if self.start == "gptq" else {}
        weights: dict[str, TrainedRounding] = {}
        for target in task.targets:
            name, form = str(target.weight.target), task.forms[str(target.weight.target)]
            matrix = task.rounded.weight(target.weight)
            matrix = matrix.t() if target.transposed else matrix
            weights[name] = TrainedRounding(matrix, form, reach=self.reach)
            if self.start == "gptq":
                try:
                    weights[name].start_from(gptq(matrix, moments[name], form))
                except InputError as error:
                    raise InputError(error.what, where=f"weight {name!r}", hint=error.hint) from error
        return weights

    def _train(self, stretch: _Stretch, weights: Mapping[str, TrainedRounding]) -> None:
        offsets = [each for weight in weights.values() for each in weight.parameters()[0]]
        ranges = [each for weight in weights.values() for each in weight.parameters()[1]]
        rate = self.learning_rate or (1.0 if self.optimizer == "sign" else 2.0) / self.steps
        groups = ((offsets, rate), (ranges, self.scale_learning_rate or rate))
        descent = _Descent(groups, adam=self.optimizer == "adam")
        parameters = [*offsets, *ranges]
        start = [each.clone() for each in parameters]
        with torch.no_grad():
            dense = {name: weight.dense() for name, weight in weights.items()}
            before = [stretch.loss(dense, [batch]) for batch in range(stretch.batches)]
        best, least = start, 1.0
        order = _in_turn(stretch.batches, self.seed)
        for step in range(self.steps):
            for each in parameters:
                each.requires_grad_()
            with torch.enable_grad():
                dense = {name: weight.dense() for name, weight in weights.items()}
            batches = self._batches(stretch, order)
            loss = stretch.loss(dense, batches, backward=True)
            # Batches differ in how hard they are: what counts is how much better than the start it is on the same ones.
            loss /= max(sum(before[batch] for batch in batches), TINY)
            with torch.no_grad():
                for each in parameters:
                    each.requires_grad_(False)
                if loss < least:
                    best, least = [each.clone() for each in parameters], loss
                descent.step(1.0 - step / self.steps)
                for weight in weights.values():
                    weight.bound()
        self._keep_best(stretch, weights, parameters, (start, best, [each.clone() for each in parameters]))

    def _batches(self, stretch: _Stretch, order: Iterator[int]) -> list[int]:
        chosen, rows = [next(order)], 0
        rows = stretch.rows(chosen[0])
        while rows < self.tokens and len(chosen) < stretch.batches:
            chosen.append(next(order))
            rows += stretch.rows(chosen[-1])
        return chosen

    @staticmethod
    def _keep_best(
        stretch: _Stretch,
        weights: Mapping[str, TrainedRounding],
        parameters: list[torch.Tensor],
        candidates: tuple[list[torch.Tensor], ...],
    ) -> None:
        """The loss of a step is that of its batches alone: what was best there, first and last, compared on all."""
        losses = []
        with torch.no_grad():
            for candidate in candidates:
                for each, value in zip(parameters, candidate, strict=True):
                    each.copy_(value)
                dense = {name: weight.dense() for name, weight in weights.items()}
                losses.append(stretch.loss(dense, range(stretch.batches)))
            for each, value in zip(parameters, candidates[losses.index(min(losses))], strict=True):
                each.copy_(value)


class _Stretch:
    """A block, run with weights in place of its own."""

    def __init__(self, task: BlockTask) -> None:
        self.task = task
        self.stored = {str(target.weight.target): target for target in task.targets}
        reached: set[fx.Node] = set()
        for node in task.block.nodes:
            if any(each in reached or str(each.target) in self.stored for each in node.all_input_nodes):
                reached.add(node)
        self.outputs = [node for node in task.outputs if node in reached]
        read = {each for node in task.block.nodes for each in node.all_input_nodes}
        self._given = [node for node in task.rounded.live() if node in read]
        own = [node for node in read if node.op == "get_attr" and str(node.target) not in self.stored]
        self._others = {str(node.target): task.rounded.weight(node).detach() for node in own}
        self._sizes = [0.0] * len(self.outputs)
        self._rows: dict[int, int] = {}
        for batch in range(self.batches):
            for index, wanted in enumerate(self._wanted(batch)):
                self._sizes[index] += float(wanted.square().sum())
                self._rows[batch] = len(wanted)
        for node, size in zip(self.outputs, self._sizes, strict=True):
            if not torch.isfinite(torch.tensor(size)):
                raise InputError(
                    "is NaN or infinite on the calibration data", where=f"%{node.name}", hint="look at the batches"
                )

    @property
    def batches(self) -> int:
        """How many there are."""
        return self.task.exact.batches

    def rows(self, batch: int) -> int:
        """Rows of the block's outputs in a batch."""
        return self._rows[batch]

    def moments(self, targets: Any) -> dict[str, torch.Tensor]:
        """``Σ x xᵀ`` of the inputs of every weight."""
        found: dict[str, torch.Tensor] = {}
        own = {name: self.task.rounded.weight(target.weight).detach() for name, target in self.stored.items()}
        with torch.no_grad():
            for batch in range(self.batches):
                values = self._run(batch, own, free=False)
                for target in targets:
                    rows = self.task.rounded.without_padding(values[target.x], batch).to(torch.float32)
                    name = str(target.weight.target)
                    found[name] = found[name].addmm_(rows.T, rows) if name in found else rows.T @ rows
        return found

    def loss(self, dense: Mapping[str, torch.Tensor], batches: Any, *, backward: bool = False) -> float:
        """Squared error of the outputs over some batches, each output relative to its size over all batches.

        Args:
            dense: the weights as ``[out, in]``, float32.
            batches: their numbers.
            backward: give the weights' parameters their gradients; one batch's activations are in memory at a time.
        """
        leaves = {name: weight.detach().requires_grad_(backward) for name, weight in dense.items()}
        total = 0.0
        with torch.set_grad_enabled(backward):
            for batch in batches:
                stored = {name: _as_stored(leaves[name], target, self.task) for name, target in self.stored.items()}
                values = self._run(batch, stored, free=True)
                loss = torch.zeros(())
                for node, size, wanted in zip(self.outputs, self._sizes, self._wanted(batch), strict=True):
                    given = self.task.rounded.without_padding(values[node], batch).to(torch.float32)
                    loss = loss + (given - wanted).square().sum() / max(size, TINY)
                if backward:
                    loss.backward()
                total += float(loss.detach())
        if backward:
            grads = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
            torch.autograd.backward([dense[name] for name in grads], list(grads.values()))
        return total

    def _run(self, batch: int, weights: Mapping[str, torch.Tensor], *, free: bool) -> dict[fx.Node, Any]:
        task = self.task
        values = {node: task.rounded.value(node, batch) for node in self._given}
        return run_nodes(task.rounded.program, task.block.nodes, values, {**self._others, **weights}, free=free)

    def _wanted(self, batch: int) -> list[torch.Tensor]:
        exact = self.task.exact
        values = (exact.value(node, batch) for node in self.outputs)
        return [exact.without_padding(value, batch).to(torch.float32) for value in values]


def _as_stored(weight: torch.Tensor, target: LinearTarget, task: BlockTask) -> torch.Tensor:
    dtype = task.rounded.weight(target.weight).dtype
    return (weight.t() if target.transposed else weight).to(dtype)


def _in_turn(count: int, seed: int) -> Iterator[int]:
    """All numbers below ``count`` in random order, again and again."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).tolist()


class _Descent:
    """Signed gradient descent, or Adam without its bias towards 0."""

    def __init__(self, groups: tuple[tuple[list[torch.Tensor], float], ...], *, adam: bool) -> None:
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
