"""Pruning every linear for the inputs that it gets from the blocks pruned before its own.

Within a block all linears are pruned for what the whole block gives them, as the authors of SparseGPT and Wanda go
about it, or one after another; the next block is given what the pruned one gives.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from graphwright.ir.errors import InputError
from graphwright.ir.mapped import release
from graphwright.ir.program import Program
from graphwright.ir.provenance import path_of
from graphwright.ir.pruned import is_masked
from graphwright.ir.sparsity import SparsityPattern
from graphwright.passes.calibration import Batch, Observed, Stream, blocks_of
from graphwright.passes.calibration.statistics import Gathering
from graphwright.passes.calibration.sufficiency import Sufficiency
from graphwright.passes.progress import Progress, progress
from graphwright.passes.quantization.checkpoint import Checkpoint, fingerprint_of
from graphwright.passes.quantization.targets import LinearTarget
from graphwright.passes.quantization.weights import check_finite
from graphwright.passes.sparsity.methods import Norms, Pruned, PruningMethod
from graphwright.passes.sparsity.targets import matrix_of, stored_as


@dataclass(frozen=True)
class Task:
    """A weight that is to be pruned.

    Attributes:
        targets: the linears that read it, in order.
        pattern: of its zeros.
        sparsity: fraction that goes.
    """

    targets: tuple[LinearTarget, ...]
    pattern: SparsityPattern
    sparsity: float

    @property
    def name(self) -> str:
        """Of the weight."""
        return str(self.targets[0].weight.target)

    @property
    def fixed(self) -> bool:
        """Whether its zeros are those of an earlier pruning."""
        return any(is_masked(target.node) for target in self.targets)


@dataclass(frozen=True)
class _Stage:
    """Weights that are pruned for the inputs that they have together.

    Attributes:
        first: where the batches must stand.
        nodes: calls from there on that the inputs are computed by.
        tasks: the weights.
    """

    first: fx.Node
    nodes: tuple[fx.Node, ...]
    tasks: Sequence[Task]


@dataclass(frozen=True)
class PruningRun:
    """What is done to which weights.

    Attributes:
        program: whose weights they are; it is not changed.
        tasks: the weights, in the order of their first linears.
        method: says which weights go.
        checkpoint: folder in which finished weights are kept, see :class:`Checkpoint`; ``None`` for none.
        sequential: linears are pruned for what those before them in their block give once they are pruned.
    """

    program: Program
    tasks: Sequence[Task]
    method: PruningMethod
    checkpoint: str | os.PathLike[str] | None = None
    sequential: bool = False

    def run(self, calibration: Iterable[Batch] | None) -> Iterator[tuple[Task, Pruned]]:
        """The weights with their new values, each as soon as it is known.

        Args:
            calibration: typical inputs, for methods that look at them.

        Raises:
            InputError: a weight is not finite, the calibration data does not serve, or the checkpoint is of another
                run.
            SerializationError: the checkpoint cannot be written.
        """
        with progress("pruning weights", len(self.tasks)) as shown:
            if self.method.needs == "nothing":
                kept, done = self._kept("none")
                for task in self.tasks:
                    yield task, done.get(task.name) or self._one(task, None, kept, shown)
                return
            assert calibration is not None
            yield from self._through(calibration, shown)

    def _through(self, calibration: Iterable[Batch], shown: Progress) -> Iterator[tuple[Task, Pruned]]:
        with Stream(self.program, calibration) as stream:
            kept, done = self._kept(stream.digest() if self.checkpoint is not None else "")
            missing = [task.name for task in self.tasks if task.name not in done]
            sufficiency = Sufficiency(of_methods=True)
            for stage in self._stages(stream):
                tasks = stage.tasks
                todo = [task for task in tasks if task.name not in done]
                inputs: dict[str, Observed | Norms] = {}
                if missing:
                    stream.advance(stage.first)
                if todo:
                    shown.now(path_of(stage.first))
                    inputs = self._inputs(stream, stage, todo, sufficiency)
                for task in tasks:
                    found = done.get(task.name)
                    if found is None:
                        missing.remove(task.name)
                        todo.remove(task)
                        source = task.targets[0].x.name
                        # Moments are the largest things here: the last that reads one may use it up.
                        given = inputs[source]
                        if any(other.targets[0].x.name == source for other in todo):
                            given = given.copy() if isinstance(given, Observed) else given
                        else:
                            del inputs[source]
                        found = self._one(task, given, kept, shown)
                    if missing:  # what comes after the stage sees it pruned
                        stream.replace_weight(task.name, stored_as(task.targets[0], found.weight))
                    yield task, found

    def _stages(self, stream: Stream) -> Iterator[_Stage]:
        """Blocks, or linears with the same input."""
        if self.sequential:
            by_input: dict[fx.Node, list[Task]] = {}
            for task in self.tasks:
                by_input.setdefault(task.targets[0].x, []).append(task)
            for tasks in by_input.values():
                yield _Stage(stream.twin(tasks[0].targets[0].node), (), tasks)
            return
        for block in blocks_of(stream.program):
            places = {node.name: place for place, node in enumerate(block.nodes)}
            tasks = [task for task in self.tasks if task.targets[0].node.name in places]
            if tasks:
                last = max(places[task.targets[0].node.name] for task in tasks)
                yield _Stage(block.nodes[0], block.nodes[:last], tasks)

    def _inputs(
        self, stream: Stream, stage: _Stage, tasks: Sequence[Task], sufficiency: Sufficiency
    ) -> dict[str, Observed | Norms]:
        """What is known of the inputs of a stage's linears while none of them is pruned, by the name of the input."""
        sources = {task.targets[0].x.name: task.name for task in reversed(tasks)}
        nodes = {task.targets[0].x.name: stream.twin(task.targets[0].x) for task in tasks}
        moments = {source: Gathering() for source in sources} if self.method.needs == "moments" else {}
        norms: dict[str, Norms] = {}
        for batch in range(stream.batches):
            values = stream.ahead(stage.nodes, batch)
            for source in sources:
                rows = stream.without_padding(values[nodes[source]], batch).to(torch.float32)
                if source in moments:
                    moments[source].add(rows)
                else:
                    norms[source] = norms[source] + Norms.over([rows]) if source in norms else Norms.over([rows])
        found: dict[str, Observed | Norms] = {}
        for source, name in sources.items():
            if source in moments:
                found[source] = observed = moments.pop(source).done()
                sufficiency.check(observed, name)
            else:
                found[source] = norms[source]
                _check(norms[source], name)
        return found

    def _one(self, task: Task, inputs: Observed | Norms | None, kept: Checkpoint | None, shown: Progress) -> Pruned:
        """Prune a weight; what is kept has its dtype."""
        name = task.name
        shown.now(path_of(task.targets[0].node))
        weight = matrix_of(self.program, task.targets[0])
        check_finite(weight, name)
        try:
            found = self.method.prune(weight.to(torch.float32), task.pattern, task.sparsity, inputs, fixed=task.fixed)
        except InputError as error:
            raise InputError(error.what, where=f"weight {name!r}", hint=error.hint) from error
        found = Pruned(found.weight.to(weight.dtype), found.loss)
        if kept is not None:
            kept.put(name, found)
        release(self.program.tensor(name))
        shown.step()
        return found

    def _kept(self, calibration: str) -> tuple[Checkpoint | None, dict[str, Pruned]]:
        """Where finished weights are kept, and those that are there already."""
        if self.checkpoint is None:
            return None, {}
        chosen = {task.name: f"{task.pattern} {task.sparsity} {task.fixed}" for task in self.tasks}
        words = f"pruning {chosen} {self.method} {self.sequential}"
        kept = Checkpoint(self.checkpoint, fingerprint_of(self.program, words, calibration), list(chosen))
        present = {name: kept.get(name) for name in chosen}
        return kept, {name: found for name, found in present.items() if isinstance(found, Pruned)}


def _check(norms: Norms, name: str) -> None:
    """Check what a weight was seen to be given.

    Raises:
        InputError: nothing, or NaN or infinity.
    """
    where = f"the input of weight {name!r}"
    if norms.count == 0:
        raise InputError("has no rows on the calibration data", where=where, hint="is all of it padding?")
    if not bool(torch.isfinite(norms.squares).all()):
        raise InputError("is NaN or infinite on the calibration data", where=where, hint="look at the batches")
