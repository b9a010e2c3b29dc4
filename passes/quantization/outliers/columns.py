"""Input features that are much larger than the others, taken out of linears into small ones of their own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

from graphwright.ir.errors import InputError
from graphwright.ir.mapped import release
from graphwright.ir.program import Program
from graphwright.ir.rewriter import Rewriter
from graphwright.passes.base import Pass
from graphwright.passes.calibration import CalibrationData, Stream
from graphwright.passes.contract import Contract, Exact
from graphwright.passes.quantization.outliers.choosing import (
    OUTLIER,
    choose,
    like_whole,
    note_refusals,
    shared_elsewhere,
)
from graphwright.passes.quantization.storing import stem
from graphwright.passes.quantization.targets import LinearTarget

_DONE = "outlier-columns-split"
# Dettmers et al. 2022, sec. 3.2: features with a magnitude of 6 or more.
_THRESHOLD = 6.0


@dataclass(frozen=True, kw_only=True)
class SplitOutlierColumns(Pass):
    """Give the input features with large activations a linear of their own, which stays in floating point.

    ::

        %y = aten.linear(%x, %w, %b)
        ->
        %kept     = aten.index_select(%x, -1, %w_kept)              the other features
        %rest     = aten.linear(%kept, %w_rest, %b)                 their columns of the weight
        %features = aten.index_select(%x, -1, %w_outliers)
        %outliers = aten.linear(%features, %w_outliers, None)       tagged "outlier": it is not quantised
        %y        = aten.add.Tensor(%rest, %outliers)

    The sum is the same; what is quantised afterwards, weights and activations, no longer holds the features that would
    stretch its ranges. So LLM.int8() is ``[SplitOutlierColumns(threshold=6.0, calibration=data),
    QuantizeLinears(activations="int8")]`` (Dettmers et al. 2022), and QUIK ``[SplitOutlierColumns(count=128,
    calibration=data), QuantizeLinears(bits=4, activations="int4", calibration=data)]`` (Ashkboos et al. 2023).

    Features are chosen from calibration data, as QUIK does. LLM.int8() looks at each batch as the model runs; a feature
    that is large there and was small in the calibration data is not caught here. QUIK's GPTQ also moves rounding errors
    into the columns that stay in floating point; here those keep their values.

    Linears that read the same value share its gathers. The new weights are named after the old one: ``….q_proj.weight``
    becomes ``….q_proj.rest.weight`` and ``….q_proj.outliers.weight``.

    It does not fire on: linears outside ``where``; the output head (see ``lm_head``); nodes with a protected tag, or
    split already; a weight that is computed, not a floating matrix, of another dtype than the input, or read by
    something else or for another input; inputs none of whose features, or all, are outliers.

    Attributes:
        threshold: features with any magnitude of at least this much, on the calibration data; 6.0 where no ``count`` is
            given either.
        count: instead, so many features with the largest magnitudes.
        calibration: typical inputs, as :class:`QuantizeLinears` takes them; needed.
        lm_head: split the output head too.
    """

    name: ClassVar[str] = "split-outlier-columns"
    contract: ClassVar[Contract] = Exact()
    before: ClassVar[tuple[str, ...]] = ("split-outlier-weights", "quantize-linears")
    respects: ClassVar[frozenset[str]] = frozenset({"adapter", "masked", "quantized", OUTLIER})

    threshold: float | None = None
    count: int | None = None
    calibration: Iterable[Any] | None = field(default=None, compare=False)
    lm_head: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threshold is not None and self.count is not None:
            raise InputError(
                "features are chosen by one of the two",
                where=f"{self.name}: threshold={self.threshold!r}, count={self.count!r}",
                hint="leave one of them out",
            )
        if self.threshold is not None and not (_is_number(self.threshold) and self.threshold > 0):
            raise InputError(f"must be a positive number, not {self.threshold!r}", where=f"{self.name}: threshold")
        count = self.count
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
            raise InputError(f"must be a number from 1 on, not {self.count!r}", where=f"{self.name}: count")
        if self.calibration is not None:
            object.__setattr__(self, "calibration", CalibrationData.of(self.calibration))

    def run(self, program: Program) -> bool:
        """Split every linear that is selected and can be.

        Raises:
            InputError: there is no calibration data, it does not fit, or a value is NaN or infinite on it.
        """
        targets, reasons = choose(self, program, _DONE, lm_head=self.lm_head)
        reasons |= shared_elsewhere(program, targets, same_input=True)
        groups: dict[fx.Node, list[LinearTarget]] = {}
        for target in targets:
            if target.node not in reasons:
                groups.setdefault(target.x, []).append(target)
        found: dict[fx.Node, torch.Tensor] = {}
        for x, magnitudes in self._magnitudes(program, groups).items():
            outliers = self._outliers(magnitudes)
            if isinstance(outliers, torch.Tensor):
                found[x] = outliers
            else:
                reasons |= {target.node: outliers for target in groups[x]}
        with program.edit() as rewriter:
            for x, outliers in found.items():
                _split(program, rewriter, groups[x], outliers)
            note_refusals(self, program, reasons)
            program.notes["linears"] = sum(len(groups[x]) for x in found)
            program.notes["outlier_features"] = sum(len(outliers) * len(groups[x]) for x, outliers in found.items())
            return rewriter.changed

    def _magnitudes(self, program: Program, groups: dict[fx.Node, list[LinearTarget]]) -> dict[fx.Node, torch.Tensor]:
        """The largest magnitude of each feature of the inputs, ``[features]`` float32."""
        if not groups:
            return {}
        if self.calibration is None:
            raise InputError(
                "needs calibration data: which features are large is seen on it",
                where=self.name,
                hint="give calibration=[batch, ...]",
            )
        found: dict[fx.Node, torch.Tensor] = {}
        with Stream(program, self.calibration) as stream:
            for x, targets in groups.items():
                stream.advance(targets[0].node)
                largest = torch.zeros(program.tensor(targets[0].weight).shape[0 if targets[0].transposed else 1])
                for rows in stream.rows(x):
                    largest = torch.maximum(largest, rows.abs().amax(0)) if len(rows) else largest
                if not bool(torch.isfinite(largest).all()):
                    raise InputError(
                        "is NaN or infinite on the calibration data",
                        where=f"the input of %{targets[0].node.name}",
                        hint="look at the batches",
                    )
                found[x] = largest
        return found

    def _outliers(self, magnitudes: torch.Tensor) -> torch.Tensor | str:
        """The outliers' places in order, int64, or why nothing is split."""
        if self.count is not None:
            if self.count >= len(magnitudes):
                return f"it has {len(magnitudes)} input features, and {self.count} were to be taken out"
            order = torch.argsort(magnitudes, descending=True, stable=True)
            return order[: self.count].sort().values
        threshold = self.threshold if self.threshold is not None else _THRESHOLD
        large = magnitudes >= threshold
        if not bool(large.any()):
            return f"none of its input features reaches {threshold:g}: the largest is {float(magnitudes.max()):.3g}"
        if bool(large.all()):
            return f"all of its input features reach {threshold:g}, and nothing would be left"
        return large.nonzero().flatten()


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _split(program: Program, rewriter: Rewriter, targets: list[LinearTarget], outliers: torch.Tensor) -> None:
    """Rewrite linears that read the same value."""
    first = targets[0]
    features = program.tensor(first.weight).shape[0 if first.transposed else 1]
    is_kept = torch.ones(features, dtype=torch.bool)
    is_kept[outliers] = False
    kept = is_kept.nonzero().flatten()
    beside = stem(str(first.weight.target))
    gathered = []
    for name, places in (("rest", kept), ("outliers", outliers)):
        index = rewriter.weight(f"{beside}{name}.features", places, like=first.node)
        operands = first.x, -1, index
        gathered.append(rewriter.call("aten.index_select", *operands, like=first.node, name=f"{name}_features"))
    made: dict[str, tuple[fx.Node, fx.Node]] = {}
    for target in targets:
        node, name = target.node, str(target.weight.target)
        if name not in made:
            weight = program.tensor(target.weight)
            matrix = weight.detach().t() if target.transposed else weight.detach()
            parts = (f"{stem(name)}rest.weight", kept, ()), (f"{stem(name)}outliers.weight", outliers, (OUTLIER,))
            whole, part = (
                rewriter.weight(wanted, like_whole(weight, matrix[:, places].contiguous()), like=node, tags=tags)
                for wanted, places, tags in parts
            )
            made[name] = whole, part
            release(weight)
        rest = rewriter.call("aten.linear", gathered[0], made[name][0], target.bias, like=node, tags=(_DONE,))
        side = rewriter.call("aten.linear", gathered[1], made[name][1], None, like=node, tags=(OUTLIER,))
        rewriter.replace(node, rewriter.call("aten.add.Tensor", rest, side, like=node))
