"""A block on its calibration data: how far its outputs are from the exact ones, and which way is nearer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import fx

from graphwright.ir.errors import InputError
from graphwright.passes.calibration.stream import run_nodes
from graphwright.passes.quantization.grids import TINY
from graphwright.passes.quantization.rounding.base import BlockTask
from graphwright.passes.quantization.targets import LinearTarget


class BlockRun:
    """A block, run on the calibration data with weights in place of its own, and held against its exact outputs.

    Attributes:
        outputs: values that later nodes read and that the weights have a say in.
    """

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

    def moments(self, targets: Iterable[LinearTarget]) -> dict[str, torch.Tensor]:
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

    def loss(self, dense: Mapping[str, torch.Tensor], batches: Iterable[int]) -> float:
        """Squared error of the outputs over some batches, each output relative to its size over all batches.

        Args:
            dense: the weights as ``[out, in]``, float32.
            batches: their numbers.
        """
        with torch.no_grad():
            return sum(float(self._error(dense, batch)) for batch in batches)

    def gradients(
        self, dense: Mapping[str, torch.Tensor], batches: Iterable[int]
    ) -> tuple[float, dict[str, torch.Tensor]]:
        """The same, and its gradients by weight; one batch's activations are in memory at a time."""
        leaves = {name: weight.detach().requires_grad_() for name, weight in dense.items()}
        total = 0.0
        with torch.enable_grad():
            for batch in batches:
                error = self._error(leaves, batch)
                error.backward()
                total += float(error.detach())
        return total, {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}

    def _error(self, dense: Mapping[str, torch.Tensor], batch: int) -> torch.Tensor:
        stored = {name: _as_stored(dense[name], target, self.task) for name, target in self.stored.items()}
        values = self._run(batch, stored, free=True)
        found = torch.zeros(())
        for node, size, wanted in zip(self.outputs, self._sizes, self._wanted(batch), strict=True):
            given = self.task.rounded.without_padding(values[node], batch).to(torch.float32)
            found = found + (given - wanted).square().sum() / max(size, TINY)
        return found

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
