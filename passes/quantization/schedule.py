"""In which order weights are quantised, and what is known of their inputs then."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from graphwright.ir.errors import InputError
from graphwright.ir.mapped import release
from graphwright.ir.program import Program
from graphwright.ir.provenance import path_of
from graphwright.passes.calibration import Batch, Block, Observed, Stream, blocks_of
from graphwright.passes.calibration.sufficiency import Sufficiency
from graphwright.passes.progress import Progress, progress
from graphwright.passes.quantization.activations import GridChoice, StaticGrid
from graphwright.passes.quantization.checkpoint import Checkpoint, fingerprint_of
from graphwright.passes.quantization.compensation import Branch, Compensation, loss_with
from graphwright.passes.quantization.formats import Format
from graphwright.passes.quantization.results import Result, Results, weight_name
from graphwright.passes.quantization.rounding.base import (
    BlockRounding,
    BlockTask,
    Codes,
    InputRounding,
    Rounding,
    WeightRounding,
)
from graphwright.passes.quantization.targets import LinearTarget, linear_target
from graphwright.passes.quantization.weights import (
    ChannelWeight,
    PackedWeight,
    check_finite,
    pack_codes,
    quantize_weight,
    quantize_weight_int8,
)

__all__ = ["Quantized", "Schedule", "weight_name"]


@dataclass(frozen=True)
class Quantized:
    """A linear's new weight.

    Attributes:
        target: the linear; several may share the weight.
        result: the weight and what goes with it.
    """

    target: LinearTarget
    result: Result


@dataclass(frozen=True)
class Schedule:
    """What is done to which linears.

    Attributes:
        program: whose linears they are.
        targets: the linears, in order.
        forms: formats of the weights, by name.
        rounding: chooses the codes.
        grids: chooses static grids of inputs; ``None`` where activations are not quantised, or as they come.
        checkpoint: folder in which finished weights are kept, see :class:`Checkpoint`; ``None`` for none.
        compensation: what is put beside the linears.
    """

    program: Program
    targets: Sequence[LinearTarget]
    forms: Mapping[str, Format]
    rounding: Rounding
    grids: GridChoice | None = None
    checkpoint: str | os.PathLike[str] | None = None
    compensation: Compensation | None = None

    def run(self, calibration: Iterable[Batch] | None) -> Iterator[Quantized]:
        """The linears with their new weights, each as soon as it is known.

        Args:
            calibration: typical inputs; needed by static grids and by methods that look at inputs.

        Raises:
            InputError: a weight is not finite, the calibration data does not serve, or the checkpoint is of another
                run.
            SerializationError: the checkpoint cannot be written.
        """
        with progress("quantising weights", len(self._names())) as shown:
            if isinstance(self.rounding, BlockRounding):
                assert calibration is not None
                yield from self._block_by_block(self.rounding, calibration, shown)
            elif calibration is not None and (
                isinstance(self.rounding, InputRounding) or self.grids is not None or self._weighs()
            ):
                yield from self._one_by_one(calibration, shown)
            else:
                results = self._results("none", shown)
                for target in self.targets:
                    name = weight_name(target)
                    if name not in results:
                        shown.now(path_of(target.node))
                        results.put(name, self._new(target, None, None))
                    yield Quantized(target, results[name])

    def _weighs(self) -> bool:
        return self.compensation is not None and self.compensation.needs_inputs()

    def _names(self) -> list[str]:
        return list(dict.fromkeys(map(weight_name, self.targets)))

    def _results(self, calibration: str, shown: Progress) -> Results:
        names = self._names()
        if self.checkpoint is None:
            return Results(names, shown, None)
        chosen = [(target.node.name, weight_name(target), target.transposed) for target in self.targets]
        words = f"{chosen} {[self.forms[name] for name in names]} {self.rounding} {self.grids} {self.compensation}"
        kept = Checkpoint(self.checkpoint, fingerprint_of(self.program, words, calibration), names)
        return Results(names, shown, kept)

    # -- every linear for the inputs that it gets from those before it ------------------------------------------------

    def _one_by_one(self, calibration: Iterable[Batch], shown: Progress) -> Iterator[Quantized]:
        sources: dict[str, set[fx.Node]] = {}
        by_input: dict[fx.Node, list[LinearTarget]] = {}
        for target in self.targets:
            sources.setdefault(weight_name(target), set()).add(target.x)
            by_input.setdefault(target.x, []).append(target)
        sufficiency = Sufficiency(of_methods=isinstance(self.rounding, InputRounding))
        passed: set[str] = set()
        with Stream(self.program, calibration) as stream:
            results = self._results(stream.digest() if self.checkpoint is not None else "", shown)
            for source, targets in by_input.items():
                todo = [name for name in dict.fromkeys(map(weight_name, targets)) if name not in results]
                if results.missing and not passed.issuperset(map(weight_name, targets)):
                    stream.advance(targets[0].node)
                inputs = Observed.over(stream.rows(source)) if todo else None
                if inputs is not None:
                    sufficiency.check(inputs, todo[0])
                for target in targets:
                    name = weight_name(target)
                    if name not in results:
                        shown.now(path_of(target.node))
                        # A weight that linears with several inputs share holds no input's scales.
                        grid = self._grid(target, inputs) if len(sources[name]) == 1 else None
                        results.put(name, self._new(target, inputs, grid, last=name == todo[-1]))
                    if todo and name == todo[-1]:
                        inputs = None  # nothing reads them any more, and moments are the largest things here
                    self._replace(stream, target, results, passed)
                    yield Quantized(target, results[name])

    def _replace(self, stream: Stream, target: LinearTarget, results: Results, passed: set[str]) -> None:
        """Let what comes after a weight see it rounded; needless once nothing is left to do."""
        name = weight_name(target)
        if name not in passed and results.missing:
            weight = results[name].dense(self.program.tensor(target.weight).dtype)
            stream.replace_weight(name, weight.t() if target.transposed else weight)
        passed.add(name)

    def _grid(self, target: LinearTarget, inputs: Observed | None) -> StaticGrid | None:
        if self.grids is None or inputs is None:
            return None
        name = weight_name(target)
        weight = self._matrix(target)
        check_finite(weight, name)
        try:
            return self.grids.choose(inputs, weight)
        except InputError as error:
            raise InputError(error.what, where=f"the input of weight {name!r}", hint="look at the batches") from error

    def _new(
        self, target: LinearTarget, inputs: Observed | None, grid: StaticGrid | None, *, last: bool = True
    ) -> Result:
        """A linear's new weight, and the branch beside it; ``inputs`` may be used up where nothing reads them after."""
        weight = self._matrix(target)
        if self.compensation is None:
            found = Result(self._quantize(target, weight, inputs, grid, last=last), grid)
        else:
            found = Result(self._quantize(target, weight, inputs, grid, last=False), grid)
            for _ in range(self.compensation.turns - 1):
                beside = self._branch(self.compensation, target, found, inputs).dense()
                rest = weight - beside
                if self.forms[weight_name(target)].keep_zeros:
                    rest = torch.where(weight == 0, 0, rest)
                found = Result(self._quantize(target, rest, inputs, grid, last=False), grid)
            found = self._compensated(self.compensation, target, found, inputs)
        release(self.program.tensor(target.weight))
        return found

    def _branch(
        self, compensation: Compensation, target: LinearTarget, found: Result, inputs: Observed | None
    ) -> Branch:
        weight, moment = self._matrix(target), inputs.moment if inputs is not None else None
        return compensation.branch(weight, found.dense(), moment, weight.dtype)

    def _compensated(
        self, compensation: Compensation, target: LinearTarget, found: Result, inputs: Observed | None
    ) -> Result:
        """With the branch; what is lost is what both together lose."""
        full = dataclasses.replace(found, branch=self._branch(compensation, target, found, inputs))
        loss = loss_with(self._matrix(target), full.dense(), inputs.moment if inputs is not None else None)
        found.packed.loss.error, found.packed.loss.size = loss.error, loss.size
        return full

    def _quantize(
        self,
        target: LinearTarget,
        weight: torch.Tensor,
        inputs: Observed | None,
        grid: StaticGrid | None,
        *,
        last: bool,
    ) -> PackedWeight | ChannelWeight:
        name, rounding = weight_name(target), self.rounding
        form = self.forms[name]
        if grid is not None:
            weight = weight.detach().to(torch.float32) * grid.scales
            inputs = inputs.scaled(1 / grid.scales) if inputs is not None else None
        elif inputs is not None and not last:
            inputs = inputs.copy()
        if not isinstance(rounding, InputRounding | WeightRounding):
            return (
                quantize_weight_int8(weight, clip_search=form.clip_search, name=name)
                if form.integer_products
                else quantize_weight(weight, form, name=name)
            )
        check_finite(weight, name)
        return pack_codes(self._codes(rounding, weight, form, inputs, name), form)

    @staticmethod
    def _codes(
        rounding: InputRounding | WeightRounding, weight: torch.Tensor, form: Format, inputs: Observed | None, name: str
    ) -> Codes:
        if isinstance(rounding, WeightRounding):
            return rounding.codes(weight, form)
        assert inputs is not None
        try:
            return rounding.codes(weight, form, inputs)
        except InputError as error:
            raise InputError(error.what, where=f"weight {name!r}", hint=error.hint) from error

    def _matrix(self, target: LinearTarget) -> torch.Tensor:
        """The weight as ``[out, in]``."""
        weight = self.program.tensor(target.weight)
        return weight.t() if target.transposed else weight

    # -- all linears of a block together -------------------------------------------------------------------------------

    def _block_by_block(
        self, rounding: BlockRounding, calibration: Iterable[Batch], shown: Progress
    ) -> Iterator[Quantized]:
        with Stream(self.program, calibration) as rounded, rounded.fork() as exact:
            results = self._results(rounded.digest() if self.checkpoint is not None else "", shown)
            passed: set[str] = set()
            for block in blocks_of(rounded.program):
                inside = {node.name for node in block.nodes}
                targets = [target for target in self.targets if target.node.name in inside]
                if not targets:
                    continue
                if results.missing:
                    rounded.advance(block.nodes[0])
                # Weights of a block are fitted together: where one of them was lost, all of them are done again.
                codes: Mapping[str, Codes] = {}
                if any(weight_name(target) not in results for target in targets):
                    shown.now(block.path)
                    task = self._task(block, targets, passed, rounded, exact)
                    for target in task.targets:
                        check_finite(self._matrix(target), weight_name(target))
                    codes = rounding.codes(task)
                for target in targets:
                    name = weight_name(target)
                    if name in codes and name not in passed:
                        found = Result(pack_codes(codes[name], self.forms[name]))
                        if self.compensation is not None:
                            rounded.advance(target.node)
                            inputs = Observed.over(rounded.rows(target.x)) if self._weighs() else None
                            found = self._compensated(self.compensation, target, found, inputs)
                        results.put(name, found)
                    if rounding.rounded_inputs:
                        self._replace(rounded, target, results, passed)
                    passed.add(name)
                    yield Quantized(target, results[name])

    def _task(
        self,
        block: Block,
        targets: Sequence[LinearTarget],
        done: Collection[str],
        rounded: Stream,
        exact: Stream,
    ) -> BlockTask:
        nodes = rounded.program.nodes
        behind = nodes[nodes.index(block.nodes[-1]) + 1]
        exact.advance(behind)
        inside = set(block.nodes)
        outputs = [
            node
            for node in block.nodes
            if not inside.issuperset(node.users)
            and isinstance(node.meta.get("val"), torch.Tensor)
            and node.meta["val"].is_floating_point()
        ]
        new = {weight_name(each): each for each in reversed(targets) if weight_name(each) not in done}
        twins = [linear_target(rounded.program, rounded.twin(each.node)) for each in reversed(new.values())]
        found = [each for each in twins if isinstance(each, LinearTarget)]
        return BlockTask(block, found, {name: self.forms[name] for name in new}, rounded, exact, outputs)
