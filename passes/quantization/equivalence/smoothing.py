"""The pass that moves what is hard to round from activations into weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from graphwright.ir.errors import InputError
from graphwright.ir.program import Program
from graphwright.passes.calibration import Stream
from graphwright.passes.quantization.equivalence.base import ScaleInputs, bounded, check_finite_rows
from graphwright.passes.quantization.equivalence.folding import Place


@dataclass(frozen=True, kw_only=True)
class SmoothActivations(ScaleInputs):
    """Divide features that are much larger than others, for INT8 activations (Xiao et al. 2023, SmoothQuant, eq. 4).

    ::

        %n = aten.layer_norm(%h, [384], %g, %b)              %n = aten.layer_norm(%h, [384], %g / s, %b / s)
        %y = aten.linear(%n, %w)                      ->     %y = aten.linear(%n, %w * s)

        %a = aten.gelu(%u)                                   %a = aten.gelu(%u)
        %y = aten.linear(%a, %w)                      ->     %m = aten.mul.Tensor(%a, %1_over_s)
                                                             %y = aten.linear(%m, %w * s)

    ``s_j = max |x_j|^strength / max |w_j|^(1 - strength)``, over the calibration data and over the weights of all
    linears that read ``x``.

    It does not fire on: linears outside ``where`` or with a protected tag; the output head (see ``lm_head``); linears
    that share a weight with other inputs; with ``fold="only"``, inputs that no weight can scale: what something else
    reads too (a residual), what comes out of GELU or SiLU, decomposed norms whose weight is not the last factor.

    Attributes:
        strength: how much of the difficulty moves into the weights: 0 none, 1 all.
    """

    name: ClassVar[str] = "smooth-activations"

    strength: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.strength, bool) or not 0.0 <= self.strength <= 1.0:
            raise InputError(f"must be in 0..1, not {self.strength!r}", where=f"{self.name}: strength")

    def factors(
        self, program: Program, places: Sequence[Place], stream: Stream
    ) -> Iterator[tuple[Place, torch.Tensor]]:
        """Equation 4 for every place."""
        for place in places:
            group = place.group
            stream.advance(group.first)
            largest = torch.stack([rows.abs().amax(0) for rows in stream.rows(group.x) if len(rows)]).amax(0)
            check_finite_rows(program, group, largest)
            columns = torch.stack([matrix.abs().amax(0) for matrix in group.matrices(program)]).amax(0)
            yield place, smoothing(largest, columns, self.strength)


def smoothing(largest: torch.Tensor, columns: torch.Tensor, strength: float) -> torch.Tensor:
    """Equation 4: what activations are divided by and weights multiplied with, ``[features]``."""
    return bounded(largest) ** strength / bounded(columns) ** (1 - strength)
