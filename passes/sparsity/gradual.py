"""Pruning a program further and further while it trains."""

from __future__ import annotations

import copy
import dataclasses

import torch

from graphwright.ir.arguments import argument
from graphwright.ir.errors import InputError
from graphwright.ir.program import Program, require_program
from graphwright.ir.provenance import add_tags
from graphwright.ir.pruned import MASKED, RECORD, is_masked, pruned_weights
from graphwright.passes.sparsity.holding import HoldMasks, ReleaseMasks, held_masks, masked_weight
from graphwright.passes.sparsity.linears import PruneLinears
from graphwright.passes.sparsity.schedules import SparsitySchedule

# What a sparsity may differ by from the one that was asked for, because weights are whole.
_SLACK = 1e-3


class PruneGradually:
    """Prunes a program by a schedule, and holds its masks in between::

        pruning = PruneGradually(program, CubicSchedule(final=0.8, steps=1000, every=100))
        for step, batch in enumerate(batches):
            pruning.step(step)
            loss(program(**batch)).backward()
            optimizer.step()
            optimizer.zero_grad()
        pruning.finish()

    Parameters stay the objects they are and are written into, so the optimiser keeps its state; a program that shares
    weights with a model that must stay as it is, is copied before (``program.clone(copy_weights=True)``). Masks only
    grow. A program that was saved in between goes on where it was.

    Attributes:
        program: what is trained.
        schedule: how sparse it is to be.
        pruning: how it is pruned; its sparsity is the schedule's.
        sparsity: as of now, of the weights that were pruned.
    """

    def __init__(self, program: Program, schedule: SparsitySchedule, pruning: PruneLinears | None = None) -> None:
        """Begin, or go on.

        Args:
            program: with parameters that may be written into.
            schedule: never falling.
            pruning: by default magnitude, unstructured, every linear alike.

        Raises:
            InputError: the pruning has a pattern that says its sparsity, or a checkpoint.
        """
        self.program, self.schedule = require_program(program), schedule
        self.pruning = pruning or PruneLinears()
        dataclasses.replace(self.pruning, sparsity=schedule.at(schedule.last))
        if self.pruning.checkpoint is not None:
            raise InputError("is of one pruning, not of several", where="PruneGradually: checkpoint")
        entries = pruned_weights(program)
        sizes = {name: program.tensor(name).numel() for name in entries}
        total = sum(entry.sparsity * sizes[name] for name, entry in entries.items())
        self.sparsity = total / max(1, sum(sizes.values()))

    def step(self, step: int) -> bool:
        """Prune to what the schedule says at a step; whether anything was pruned.

        Raises:
            InputError: that is less than before, or the program cannot be pruned; it is as it was.
        """
        wanted = self.schedule.at(step)
        if wanted < self.sparsity - _SLACK:
            raise InputError(
                f"goes down from {self.sparsity:.4g} to {wanted:.4g} at step {step}",
                where=f"schedule {self.schedule}",
                hint="masks only grow: go on from the step that the program was saved at",
            )
        if wanted <= self.sparsity + _SLACK:
            return False
        self._release()
        try:
            trial = self.program.clone()
            dataclasses.replace(self.pruning, sparsity=wanted)(trial)
            self._take_over(trial)
            self.sparsity = wanted
        finally:
            HoldMasks()(self.program)
        return True

    def finish(self) -> None:
        """Let go of the masks: the program is one that was pruned, and can be quantised, merged into or exported."""
        self._release()

    def _release(self) -> None:
        with torch.no_grad():
            for node in held_masks(self.program):
                self.program.tensor(argument(node, "weight")).copy_(masked_weight(self.program, node))
        ReleaseMasks()(self.program)

    def _take_over(self, trial: Program) -> None:
        """Values, tags and records, into the parameters that there are."""
        nodes = {node.name: node for node in self.program.nodes}
        for node in trial.nodes:
            if is_masked(node):
                add_tags(nodes[node.name], (MASKED,))
        with torch.no_grad():
            for name in pruned_weights(trial):
                self.program.tensor(name).copy_(trial.tensor(name))
        self.program.records[RECORD] = copy.deepcopy(trial.records[RECORD])
