"""How little a layer, or a part of one, changes what goes through it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import fx

from graphwright.ir.errors import InputError
from graphwright.ir.program import Program
from graphwright.passes.calibration import CalibrationData, Stream


def similarities(
    program: Program, places: Sequence[tuple[fx.Node, fx.Node]], calibration: CalibrationData
) -> list[float]:
    """The mean cosine between what enters and what leaves, over all positions of the calibration data.

    Args:
        program: whose nodes they are.
        places: entry and exit of each stretch, in the order in which they run; values ``[..., features]``.
        calibration: typical inputs.

    Returns:
        one number for each stretch: 1 where the value only changes its length (He et al. 2024, LLM-Drop; Men et al.
        2024, ShortGPT, whose block influence is 1 minus this).

    Raises:
        InputError: the data does not fit the program, or a value is NaN or infinite on it.
    """
    nodes = program.nodes
    behind = dict(itertools.pairwise(nodes))
    found: list[float] = []
    with Stream(program, calibration) as stream:
        for entry, exit_ in places:
            stream.advance(behind[entry])
            before = list(stream.rows(entry))
            stream.advance(behind[exit_])
            total, count = 0.0, 0
            for one, other in zip(before, stream.rows(exit_), strict=True):
                cosines = torch.cosine_similarity(one.double(), other.double(), dim=-1)
                total, count = total + float(cosines.sum()), count + len(cosines)
            mean = total / max(count, 1)
            if not -1.001 <= mean <= 1.001:  # also NaN
                raise InputError(
                    "is NaN or infinite on the calibration data",
                    where=f"%{exit_.name}",
                    hint="check the calibration data and the weights",
                )
            found.append(mean)
    return found
