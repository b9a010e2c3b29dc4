"""What a decoding step goes through before it is quantised and lowered."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from graphwright.passes.base import Pass
from graphwright.passes.cleanup import Cleanup, FoldConstants, TransposeLinears
from graphwright.passes.decoding.flattening import UnflattenRows
from graphwright.passes.decoding.positions import TabulatePositions
from graphwright.passes.decoding.rows import HoistRowSelection
from graphwright.passes.fusion import FuseAll
from graphwright.passes.pipeline import Pipeline


@dataclass(frozen=True, kw_only=True)
class PrepareDecoder(Pipeline):
    """Bring a decoding step into the form that backends run best; quantise after it.

    Tracing noise goes first, as it hides patterns, and so do GPT-2's and OPT's flattened rows; then patterns become
    operators, logits are computed for wanted rows only, and rotary embeddings are looked up. What is computed from
    weights alone, such as Gemma's ``1 + weight``, is stored, so the program is not meant to be trained any more. Each
    pass is verified and reported by itself.

    Attributes:
        length: positions for which there are rotary embeddings, see :class:`TabulatePositions`; no sequence can be
            longer.
    """

    name: ClassVar[str] = "prepare-decoder"

    length: int = 4096
    passes: tuple[Pass, ...] = field(default=(), init=False)

    def __post_init__(self) -> None:
        steps = (
            Cleanup(),
            TransposeLinears(),
            UnflattenRows(),
            FuseAll(),
            HoistRowSelection(),
            TabulatePositions(length=self.length),
            FoldConstants(fold_parameters=True),
            Cleanup(),
        )
        object.__setattr__(self, "passes", steps)
        super().__post_init__()
