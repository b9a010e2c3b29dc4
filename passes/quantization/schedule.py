"""In which order weights are quantised, and what is known of their inputs then."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from graphwright.ir.errors import InputError
from graphwright.ir.mapped import release
from graphwright.ir.program import Program
from graphwright.passes.calibration import Batch, Block, Observed, Stream, blocks_of
from graphwright.passes.quantization.activations import GridChoice, StaticGrid
from graphwright.passes.quantization.formats import Format
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


@dataclass(frozen=True)
class Quantized:
    """A linear's new weight.

    Attributes:
        target: the linear; several may share the weight.
        packed: the weight; with a static grid, multiplied with its scales before it was rounded.
        grid: of the linear's inputs, where it was fixed beforehand.
    """

    target: LinearTarget
    packed: PackedWeight | ChannelWeight
    grid: StaticGrid | None = None


@dataclass(frozen=True)
class Schedule:
    """What is done to which linears.

    Attributes:
        program: whose linears they are.
        targets: the linears, in order.
        forms: formats of the weights, by name.
        rounding: chooses the codes.
        grids: chooses static grids of inputs; ``None`` where activations are not quantised, or as they come.
    """

    program: Program
    targets: Sequence[LinearTarget]
    forms: Mapping[str, Format]
    rounding: Rounding
    grids: GridChoice | None = None

    def run(self, calibration: Iterable[Batch] | None) -> Iterator[Quantized]:
        """The linears with their new weights, each as soon as it is known.

        Args:
            calibration: typical inputs; needed by static grids and by methods that look at inputs.

        Raises:
            InputError: a weight is not finite, or the calibration data does not serve.
        """
        if isinstance(self.rounding, BlockRounding):
            assert calibration is not None
            yield from self._block_by_block(self.rounding, calibration)
        elif calibration is not None and (isinstance(self.rounding, InputRounding) or self.grids is not None):
            yield from self._one_by_one(calibration)
        else:
            packed: dict[str, PackedWeight | ChannelWeight] = {}
            for target in self.targets:
                name = weight_name(target)
                if name not in packed:
                    packed[name] = self._quantize(target, None, None)
                yield Quantized(target, packed[name])

    # -- every linear for the inputs that it gets from those before it ------------------------------------------------

    def _one_by_one(self, calibration: Iterable[Batch]) -> Iterator[Quantized]:
        sources: dict[str, set[fx.Node]] = {}
        by_input: dict[fx.Node, list[LinearTarget]] = {}
        for target in self.targets:
            sources.setdefault(weight_name(target), set()).add(target.x)
            by_input.setdefault(target.x, []).append(target)
        done: dict[str, Quantized] = {}
        with Stream(self.program, calibration) as stream:
            for source, targets in by_input.items():
                new = [target for target in targets if weight_name(target) not in done]
                if new:
                    stream.advance(targets[0].node)
                    inputs = Observed.over(stream.rows(source))
                for target in targets:
                    name = weight_name(target)
                    if name not in done:
                        # A weight that linears with several inputs share holds no input's scales.
                        grid = self._grid(target, inputs) if len(sources[name]) == 1 else None
                        done[name] = Quantized(target, self._quantize(target, inputs, grid), grid)
                        stream.replace_weight(name, _dense(done[name], self.program.tensor(target.weight).dtype))
                    yield Quantized(target, done[name].packed, done[name].grid)

    def _grid(self, target: LinearTarget, inputs: Observed) -> StaticGrid | None:
        if self.grids is None:
            return None
        name = weight_name(target)
        weight = self._matrix(target)
        check_finite(weight, name)
        try:
            return self.grids.choose(inputs, weight)
        except InputError as error:
            raise InputError(error.what, where=f"the input of weight {name!r}", hint="look at the batches") from error

    def _quantize(
        self, target: LinearTarget, inputs: Observed | None, grid: StaticGrid | None
    ) -> PackedWeight | ChannelWeight:
        name, weight, rounding = weight_name(target), self._matrix(target), self.rounding
        form = self.forms[name]
        if grid is not None:
            weight = weight.detach().to(torch.float32) * grid.scales
            inputs = inputs.scaled(1 / grid.scales) if inputs is not None else None
        found: PackedWeight | ChannelWeight
        if not isinstance(rounding, InputRounding | WeightRounding):
            found = (
                quantize_weight_int8(weight, clip_search=form.clip_search, name=name)
                if form.integer_products
                else quantize_weight(weight, form, name=name)
            )
        else:
            check_finite(weight, name)
            found = pack_codes(self._codes(rounding, weight, form, inputs, name), form)
        release(self.program.tensor(target.weight))
        return found

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

    def _block_by_block(self, rounding: BlockRounding, calibration: Iterable[Batch]) -> Iterator[Quantized]:
        done: dict[str, PackedWeight | ChannelWeight] = {}
        with Stream(self.program, calibration) as exact, Stream(self.program, calibration) as rounded:
            for block in blocks_of(rounded.program):
                inside = {node.name for node in block.nodes}
                targets = [target for target in self.targets if target.node.name in inside]
                if not targets:
                    continue
                task = self._task(block, targets, done, rounded, exact)
                for target in task.targets:
                    check_finite(self._matrix(target), weight_name(target))
                for name, codes in rounding.codes(task).items():
                    done[name] = pack_codes(codes, self.forms[name])
                for target in targets:
                    name = weight_name(target)
                    found = Quantized(target, done[name])
                    if rounding.rounded_inputs:
                        rounded.replace_weight(name, _dense(found, self.program.tensor(target.weight).dtype))
                    yield found

    def _task(
        self,
        block: Block,
        targets: Sequence[LinearTarget],
        done: Mapping[str, object],
        rounded: Stream,
        exact: Stream,
    ) -> BlockTask:
        nodes = rounded.program.nodes
        behind = nodes[nodes.index(block.nodes[-1]) + 1]
        rounded.advance(block.nodes[0])
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


def weight_name(target: LinearTarget) -> str:
    """The name of a linear's weight."""
    return str(target.weight.target)


def _dense(found: Quantized, dtype: torch.dtype) -> torch.Tensor:
    """The weight that a packed one stands for, as the linear stores it."""
    weight = found.packed.dense()
    if found.grid is not None:
        weight /= found.grid.scales
    return (weight.t() if found.target.transposed else weight).to(dtype)
