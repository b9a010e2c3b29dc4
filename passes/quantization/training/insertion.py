"""The pass that lets linears train with rounded weights and activations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx, nn

from graphwright.ir.arguments import arguments_of
from graphwright.ir.errors import InputError
from graphwright.ir.pattern import Refusal
from graphwright.ir.program import Program
from graphwright.ir.provenance import path_of, tags_of
from graphwright.ir.rewriter import Rewriter
from graphwright.passes.base import Pass
from graphwright.passes.calibration import CalibrationData, Observed, Stream
from graphwright.passes.contract import Contract, Retrain
from graphwright.passes.quantization.checks import check_format
from graphwright.passes.quantization.formats import Format
from graphwright.passes.quantization.storing import stem
from graphwright.passes.quantization.targets import LinearTarget, half_shared, is_head, linear_target
from graphwright.passes.quantization.weights import check_finite

# Fractions of the observed range tried for activations; what lies beyond is clipped.
_RANGES = (1.0, 0.92, 0.84, 0.75, 0.65, 0.55)
_LEVELS = 255
_TAGS = ("quantized",)


@dataclass(frozen=True, kw_only=True)
class InsertFakeQuantize(Pass):
    """Let linears compute with rounded weights, and on request with rounded activations, in floating point.

    ::

        %y = aten.linear(%x, %w, %b)
        ->
        %rounded = graphwright.fake_quantize(%w, %weight_scale, None, -8, 7, 128)
        %input = graphwright.fake_quantize(%x, %input_scale, %input_zero_point, 0, 255, 0)      activations="int8"
        %y = aten.linear(%input, %rounded, %b)

    The program then trains like any module: weights move as if they were not rounded, and the scales are parameters of
    their own, ``….weight_scale`` and ``….input_scale`` (Esser et al. 2020, "Learned Step Size Quantization"). Zero
    points stay as they are. :class:`ConvertFakeQuantize` stores what was trained as integers. Linears that share a
    weight or an input share its rounding.

    It does not fire on: linears outside ``where``; the output head (see ``lm_head``); nodes with a protected tag; what
    cannot be quantised (see :class:`QuantizeLinears`); weights stored ``[in, out]``, which :class:`TransposeLinears`
    turns.

    Attributes:
        bits: of the weights' codes.
        group_size: columns to a scale; ``None`` for one scale per output channel.
        symmetric: zero point fixed at the middle code.
        clip_search: start from the range with the least squared error instead of the full one.
        activations: ``"none"``, or ``"int8"``: inputs rounded to 8 bits on one grid per tensor, whose start is the one
            with the least squared error on the calibration data; weights then are symmetric INT8 per channel.
        calibration: typical inputs, for the activations' ranges.
        lm_head: the output head too.
    """

    name: ClassVar[str] = "insert-fake-quantize"
    contract: ClassVar[Contract] = Retrain()
    respects: ClassVar[frozenset[str]] = frozenset({"adapter", "masked", "quantized"})

    bits: int = 8
    group_size: int | None = None
    symmetric: bool = True
    clip_search: bool = True
    activations: str = "none"
    calibration: Iterable[Any] | None = field(default=None, compare=False)
    lm_head: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_format(self.name, self.bits, self.group_size)
        if self.activations not in ("none", "int8"):
            raise InputError(f"must be 'none' or 'int8', not {self.activations!r}", where=f"{self.name}: activations")
        if self.calibration is not None:
            object.__setattr__(self, "calibration", CalibrationData.of(self.calibration))
        if self.activations == "none":
            return
        if self.calibration is None:
            raise InputError(
                "needs calibration data", where=f"{self.name}: activations='int8'", hint="give calibration=[batch, ...]"
            )
        if self.bits != 8 or self.group_size is not None or not self.symmetric:
            raise InputError(
                "INT8 activations go with symmetric INT8 weights, one scale per channel",
                where=f"{self.name}: activations='int8'",
                hint="use bits=8, group_size=None, symmetric=True",
            )

    def run(self, program: Program) -> bool:
        """Round what every linear that is selected and can be reads.

        Raises:
            InputError: a weight or the calibration data holds NaN or infinity.
        """
        targets = self._targets(program)
        ranges = self._ranges(program, targets)
        rounded: dict[str, fx.Node] = {}
        inputs: dict[fx.Node, fx.Node] = {}
        with program.edit() as rewriter:
            for target in targets:
                name = str(target.weight.target)
                if name not in rounded:
                    rounded[name] = self._weight(rewriter, target)
                source = arguments_of(target.node)["input"]  # it may be a linear that was replaced since
                if target.x in ranges and source not in inputs:
                    inputs[source] = self._input(rewriter, target, source, ranges[target.x])
                operands = inputs.get(source, source), rounded[name], target.bias
                new = rewriter.call("aten.linear", *operands, like=target.node, tags=_TAGS)
                rewriter.replace(target.node, new)
            program.notes["linears"] = len(targets)
            return rewriter.changed

    def _targets(self, program: Program) -> list[LinearTarget]:
        chosen = self.selected(program)
        targets: list[LinearTarget] = []
        reasons: dict[fx.Node, str] = {}
        for node in program.nodes:
            found = linear_target(program, node) if node.op == "call_function" else None
            if found is None:
                continue
            reason = self._refuse(program, node, found, chosen(node))
            if reason is not None:
                reasons[node] = reason
            elif isinstance(found, LinearTarget):
                targets.append(found)
        reasons.update(half_shared(program, targets))
        refusals = [Refusal(self.name, node.name, path_of(node), reason, 1) for node, reason in reasons.items()]
        program.notes["refusals"] = (*program.notes.get("refusals", ()), *refusals)
        return [target for target in targets if target.node not in reasons]

    def _refuse(self, program: Program, node: fx.Node, found: LinearTarget | str, selected: bool) -> str | None:
        if isinstance(found, str):
            return found
        if not selected:
            return "not selected by where= / ignore="
        protected = tags_of(node) & self.respects
        if protected:
            return f"it is tagged {', '.join(sorted(protected))}, which this pass leaves alone"
        if not self.lm_head and is_head(program, node):
            return "it is the output head, which is left in floating point (set lm_head=True to round it)"
        if found.transposed:
            return "its weight is stored [in, out] (TransposeLinears turns it)"
        return None

    def _ranges(self, program: Program, targets: Sequence[LinearTarget]) -> Mapping[fx.Node, tuple[float, int]]:
        """Scale and zero point of every input of the linears, where activations are rounded."""
        found: dict[fx.Node, tuple[float, int]] = {}
        if self.activations == "none" or self.calibration is None:
            return found
        with Stream(program, self.calibration) as stream:
            for target in targets:
                if target.x in found:
                    continue
                stream.advance(target.node)
                try:
                    found[target.x] = input_grid(Observed.over(stream.rows(target.x)))
                except InputError as error:
                    raise InputError(error.what, where=f"the input of %{target.node.name}", hint=error.hint) from error
        return found

    def _weight(self, rewriter: Rewriter, target: LinearTarget) -> fx.Node:
        name, products = str(target.weight.target), self.activations == "int8"
        weight = rewriter.program.tensor(target.weight).detach()
        check_finite(weight, name)
        form = Format(self.bits, self.group_size, self.symmetric, self.clip_search, integer_products=products)
        group, columns = form.columns_per_group(weight.shape[1]), weight.shape[1]
        wide = nn.functional.pad(weight.to(torch.float32), (0, -columns % group))
        scale, zero = form.fit(wide.reshape(len(weight), -1, group))
        base, half = stem(name), 2 ** (self.bits - 1)
        kept = nn.Parameter(scale)
        step = rewriter.weight(f"{base}weight_scale", kept, like=target.node, tags=_TAGS)
        point = None
        if not self.symmetric:
            points = zero.to(torch.uint8)
            point = rewriter.weight(f"{base}weight_zero_point", points, like=target.node, tags=_TAGS)
        low, high = (-half + products, half - 1) if self.symmetric else (0, 2 * half - 1)
        operands = target.weight, step, point, low, high, group
        return rewriter.call("graphwright.fake_quantize", *operands, like=target.node, tags=_TAGS)

    @staticmethod
    def _input(rewriter: Rewriter, target: LinearTarget, source: fx.Node, grid: tuple[float, int]) -> fx.Node:
        base = stem(str(target.weight.target))
        scale = nn.Parameter(torch.tensor(grid[0]))
        step = rewriter.weight(f"{base}input_scale", scale, like=target.node, tags=_TAGS)
        zero = torch.tensor(grid[1], dtype=torch.uint8)
        point = rewriter.weight(f"{base}input_zero_point", zero, like=target.node, tags=_TAGS)
        operands = source, step, point, 0, _LEVELS, 0
        return rewriter.call("graphwright.fake_quantize", *operands, like=target.node, tags=_TAGS)


def input_grid(inputs: Observed) -> tuple[float, int]:
    """The scale and zero point of 8-bit codes with the least squared error on what was seen; the range includes 0.

    Raises:
        InputError: it is not finite.
    """
    low, high = min(0.0, float(inputs.low.min())), max(0.0, float(inputs.high.max()))
    if not (low > -float("inf") and high < float("inf")):
        raise InputError("is NaN or infinite on the calibration data", hint="look at the batches")
    if high <= low:
        low, high = 0.0, 1.0  # nothing but zeros: any grid that has a zero
    best, least = (1.0, 0), float("inf")
    for part in _RANGES:
        step = part * (high - low) / _LEVELS
        zero = round(-low * part / step)
        codes = (inputs.rows / step).round_().clamp_(-zero, _LEVELS - zero)
        error = float((codes * step - inputs.rows).square_().sum())
        if error < least:
            best, least = (step, zero), error
    return best
