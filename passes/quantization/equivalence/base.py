"""What passes that scale the inputs of linears share: groups, places, and the way through the calibration data."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from graphwright.ir.errors import InputError
from graphwright.ir.pattern import Refusal
from graphwright.ir.program import Program
from graphwright.ir.provenance import path_of
from graphwright.passes.base import Pass
from graphwright.passes.calibration import CalibrationData, Stream
from graphwright.passes.contract import Contract, Exact
from graphwright.passes.quantization.equivalence.folding import Place, check_fold, place_of, scale
from graphwright.passes.quantization.equivalence.groups import Group, groups_of


@dataclass(frozen=True, kw_only=True)
class ScaleInputs(Pass):
    """Multiply the weights of linears with a factor for each input feature, and divide the inputs by it.

    Attributes:
        calibration: typical inputs: batches, each as the model is called, a ``DataLoader`` of such, or
            :class:`CalibrationData`.
        fold: where the division goes. ``"auto"``: into the weights behind (a norm's, an earlier linear's), and a
            multiplication ``x * (1 / s)`` of its own where none can take it. ``"only"``: into weights, or the group
            stays as it is. ``"multiply"``: always a multiplication.
        lm_head: scale the input of the output head too.
    """

    contract: ClassVar[Contract] = Exact(tolerance=1e-6, stored=True)
    before: ClassVar[tuple[str, ...]] = ("quantize-linears",)
    respects: ClassVar[frozenset[str]] = frozenset({"adapter", "quantized"})

    calibration: Iterable[Any] | None = field(default=None, compare=False)
    fold: str = "auto"
    lm_head: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fold(self.name, self.fold)
        if self.calibration is not None:
            object.__setattr__(self, "calibration", CalibrationData.of(self.calibration))

    @abstractmethod
    def factors(
        self, program: Program, places: Sequence[Place], stream: Stream
    ) -> Iterator[tuple[Place, torch.Tensor]]:
        """Factors ``[features]`` of the weights for each place, in order; those that are not worth a change may lack.

        Raises:
            InputError: the calibration data does not serve.
        """

    def run(self, program: Program) -> bool:
        """Scale every group of linears that is selected and can be.

        Raises:
            InputError: there is no calibration data, or it or a weight holds NaN or infinity.
        """
        if self.calibration is None:
            raise InputError(
                "needs calibration data", where=f"{self.name}: calibration", hint="give calibration=[batch, ...]"
            )
        places = self._places(program)
        counts = {"folded": 0, "multiplied": 0}
        if not places:
            return False
        with program.edit() as rewriter:
            with Stream(program, self.calibration) as stream:
                for place, factors in self.factors(program, places, stream):
                    scale(rewriter, place, place.tied(factors))
                    counts["multiplied" if place.absorbed is None else "folded"] += 1
            program.notes.update(counts)
            return rewriter.changed

    def _places(self, program: Program) -> list[Place]:
        places, refusals = [], []
        for found in groups_of(program, self.selected(program), self.respects, lm_head=self.lm_head):
            if not isinstance(found, Group):
                node, reason = found
                refusals.append(Refusal(self.name, node.name, path_of(node), reason, 1))
                continue
            place = place_of(program, found, self.fold, self.respects)
            if isinstance(place, Place):
                places.append(place)
            else:
                refusals.append(found.refusal(self.name, place, 2))
        program.notes["refusals"] = (*program.notes.get("refusals", ()), *refusals)
        return sorted(places, key=lambda place: place.group.first)


def bounded(values: torch.Tensor, least: float = 1e-4) -> torch.Tensor:
    """Sizes of features, those far below the largest lifted, so that no factor is 0 or huge."""
    top = float(values.max())
    return values.clamp(min=least * top) if top > 0 else torch.ones_like(values)


def check_finite_rows(program: Program, group: Group, sizes: torch.Tensor) -> None:
    """Check what was learnt of a group's inputs.

    Raises:
        InputError: there were NaN or infinity.
    """
    if not bool(torch.isfinite(sizes).all()):
        raise InputError(
            "its input is NaN or infinite on the calibration data",
            where=f"%{group.first.name} in {path_of(group.first)}",
            hint="check the calibration data and the weights",
        )
