"""The few weights that matter most, taken out of linears and kept in floating point."""

from __future__ import annotations

import math
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

_DONE = "outlier-weights-split"
_CRITERIA = ("magnitude", "sensitivity")
# In a larger share of the weights, a column index for each takes more than the bits that are saved.
_MOST = 0.1
_SHORT = torch.iinfo(torch.int16).max


@dataclass(frozen=True, kw_only=True)
class SplitOutlierWeights(Pass):
    """Keep the weights that rounding would hurt most in floating point, in a sparse matrix beside the linear.

    ::

        %y = aten.linear(%x, %w, %b)
        ->
        %rest     = aten.linear(%x, %w_rest, %b)                                      0 where a weight was taken
        %outliers = graphwright.linear_outliers(%x, %row_pointers, %columns, %values)
        %y        = aten.add.Tensor(%rest, %outliers)

    The sum is the same. What is quantised afterwards is the rest, whose ranges are narrower: sparse protection of
    outliers (Li et al. 2023, "LLM-MQ"; Dettmers et al. 2023, "SpQR"). A weight takes its value and an index of 2 bytes
    (4 beyond 32 768 input features). Values of a float32 weight are stored in bfloat16 or float16 where all of
    them are numbers of that format, else in the weight's own: none is ever rounded.

    The new weights are named after the old one: ``….q_proj.weight`` becomes ``….q_proj.rest.weight`` and
    ``….q_proj.outliers.row_pointers``, ``….columns`` and ``….values``.

    It does not fire on: linears outside ``where``; the output head (see ``lm_head``); nodes with a protected tag, or
    split already; a weight that is computed, not a floating matrix, of another dtype than the input, or read by
    something else; a weight that is too small for one entry, or of zeros.

    Attributes:
        fraction: of each weight's entries that is taken, at most 0.1.
        criterion: which: ``"magnitude"``, the largest ``|w|``; ``"sensitivity"``, the largest ``|w| · sqrt(mean x²)``
            of the input feature that the weight meets, the change of the output that losing it would make (needs
            calibration data).
        calibration: typical inputs, as :class:`QuantizeLinears` takes them.
        lm_head: split the output head too.
    """

    name: ClassVar[str] = "split-outlier-weights"
    contract: ClassVar[Contract] = Exact()
    before: ClassVar[tuple[str, ...]] = ("quantize-linears",)
    respects: ClassVar[frozenset[str]] = frozenset({"adapter", "masked", "quantized", OUTLIER})

    fraction: float = 0.005
    criterion: str = "magnitude"
    calibration: Iterable[Any] | None = field(default=None, compare=False)
    lm_head: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.fraction, bool) or not isinstance(self.fraction, int | float):
            raise InputError(f"must be a number, not {self.fraction!r}", where=f"{self.name}: fraction")
        if not 0 < self.fraction <= _MOST:
            raise InputError(
                f"must be above 0 and at most {_MOST}, not {self.fraction!r}",
                where=f"{self.name}: fraction",
                hint="0.005 is usual; a larger share costs more than another bit for all weights",
            )
        if self.criterion not in _CRITERIA:
            known = ", ".join(map(repr, _CRITERIA))
            raise InputError(f"must be one of {known}, not {self.criterion!r}", where=f"{self.name}: criterion")
        if self.calibration is not None:
            object.__setattr__(self, "calibration", CalibrationData.of(self.calibration))
        elif self.criterion == "sensitivity":
            raise InputError(
                "needs calibration data",
                where=f"{self.name}: criterion='sensitivity'",
                hint="give calibration=[batch, ...]",
            )

    def run(self, program: Program) -> bool:
        """Split every linear that is selected and can be.

        Raises:
            InputError: a weight holds NaN or infinity, or the calibration data does not serve.
        """
        targets, reasons = choose(self, program, _DONE, lm_head=self.lm_head)
        reasons |= shared_elsewhere(program, targets, same_input=self.criterion == "sensitivity")
        by_weight: dict[str, list[LinearTarget]] = {}
        for target in targets:
            if target.node not in reasons:
                by_weight.setdefault(str(target.weight.target), []).append(target)
        sizes = self._input_sizes(program, [group[0] for group in by_weight.values()])
        taken = 0
        with program.edit() as rewriter:
            for name, group in by_weight.items():
                places = self._places(_matrix(program, group[0]), sizes.get(name), name)
                if isinstance(places, str):
                    reasons |= {target.node: places for target in group}
                    continue
                _split(program, rewriter, group, places)
                taken += len(places)
            note_refusals(self, program, reasons)
            program.notes["linears"] = sum(target.node not in reasons for target in targets)
            program.notes["outlier_weights"] = taken
            return rewriter.changed

    def _input_sizes(self, program: Program, targets: list[LinearTarget]) -> dict[str, torch.Tensor]:
        """Root mean square of every input feature ``[in]`` float32, by weight name; empty where it is not asked for."""
        if self.criterion != "sensitivity" or not targets:
            return {}
        assert self.calibration is not None
        found: dict[str, torch.Tensor] = {}
        known: dict[fx.Node, torch.Tensor] = {}
        with Stream(program, self.calibration) as stream:
            for target in targets:
                if target.x not in known:
                    stream.advance(target.node)
                    total, count = torch.zeros(_matrix(program, target).shape[1]), 0
                    for rows in stream.rows(target.x):
                        total, count = total + rows.square().sum(0), count + len(rows)
                    known[target.x] = (total / max(1, count)).sqrt()
                    if not bool(torch.isfinite(total).all()):
                        raise InputError(
                            "is NaN or infinite on the calibration data",
                            where=f"the input of %{target.node.name}",
                            hint="look at the batches",
                        )
                found[str(target.weight.target)] = known[target.x]
        return found

    def _places(self, weight: torch.Tensor, sizes: torch.Tensor | None, name: str) -> torch.Tensor | str:
        """Flat places of the entries to take from ``weight [out, in]``, rising, or why there are none."""
        count = math.floor(self.fraction * weight.numel())
        if count == 0:
            return f"its weight has {weight.numel()} entries, of which {self.fraction:g} is less than one"
        scores = weight.detach().to(torch.float32).abs()
        if not bool(torch.isfinite(scores).all()):
            raise InputError(
                "holds NaN or infinity", where=f"weight {name!r}", hint="repair the checkpoint, or use ignore="
            )
        if sizes is not None:
            scores = scores * sizes
        best = torch.topk(scores.flatten(), count, sorted=False)
        places = best.indices[best.values > 0].sort().values
        return places if len(places) else "its weights count for nothing: all are 0, or meet nothing but 0"


def _matrix(program: Program, target: LinearTarget) -> torch.Tensor:
    """The weight as ``[out, in]``."""
    weight = program.tensor(target.weight)
    return weight.t() if target.transposed else weight


def _split(program: Program, rewriter: Rewriter, targets: list[LinearTarget], places: torch.Tensor) -> None:
    """Rewrite linears that share a weight."""
    node, weight, name = targets[0].node, program.tensor(targets[0].weight), str(targets[0].weight.target)
    rest = _matrix(program, targets[0]).detach().clone(memory_format=torch.contiguous_format)
    release(weight)
    outputs, features = rest.shape
    rows, columns = places // features, places % features
    values = narrowest(rest.view(-1)[places])
    rest.view(-1)[places] = 0
    pointers = torch.zeros(outputs + 1, dtype=torch.int32)
    pointers[1:] = torch.bincount(rows, minlength=outputs).cumsum(0)
    stored = {
        "row_pointers": pointers,
        "columns": columns.to(torch.int16 if features - 1 <= _SHORT else torch.int32),
        "values": like_whole(weight, values),
    }
    base = rewriter.weight(f"{stem(name)}rest.weight", like_whole(weight, rest), like=node)
    operands = [
        rewriter.weight(f"{stem(name)}outliers.{part}", tensor, like=node, tags=(OUTLIER,))
        for part, tensor in stored.items()
    ]
    for target in targets:
        old = target.node
        dense = rewriter.call("aten.linear", target.x, base, target.bias, like=old, tags=(_DONE,))
        sparse = rewriter.call("graphwright.linear_outliers", target.x, *operands, like=old, tags=(OUTLIER,))
        rewriter.replace(old, rewriter.call("aten.add.Tensor", dense, sparse, like=old))


def narrowest(values: torch.Tensor) -> torch.Tensor:
    """The same numbers in half the bytes where a 16-bit format holds every one of them; else as they are."""
    if values.dtype == torch.float32:
        for narrow in (torch.bfloat16, torch.float16):
            if bool((values.to(narrow).to(torch.float32) == values).all()):
                return values.to(narrow)
    return values
