"""The weights of a run that are done, and where they are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from graphwright.passes.progress import Progress
from graphwright.passes.quantization.activations import StaticGrid
from graphwright.passes.quantization.checkpoint import Checkpoint
from graphwright.passes.quantization.compensation import Branch
from graphwright.passes.quantization.targets import LinearTarget
from graphwright.passes.quantization.weights import ChannelWeight, PackedWeight


@dataclass(frozen=True)
class Result:
    """A weight that is done.

    Attributes:
        packed: the weight; with a static grid, multiplied with its scales before it was rounded.
        grid: of the linear's inputs, where it was fixed beforehand.
        branch: what stands beside the linear.
    """

    packed: PackedWeight | ChannelWeight
    grid: StaticGrid | None = None
    branch: Branch | None = None

    def dense(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight that all of it stands for, ``[out, in]``; computed in float32."""
        if self.grid is None and self.branch is None:
            return self.packed.dense(dtype)
        weight = self.packed.dense()
        if self.grid is not None:
            weight /= self.grid.scales
        return (weight if self.branch is None else weight.add_(self.branch.dense())).to(dtype)


class Results:
    """Weights by name.

    Attributes:
        shown: the progress of the run.
    """

    def __init__(self, names: Sequence[str], shown: Progress, kept: Checkpoint | None) -> None:
        """Begin with what a checkpoint holds."""
        self.shown = shown
        self._kept = kept
        self._done: dict[str, Result] = {}
        self._names = tuple(names)
        for name in names if kept is not None else ():
            found = kept.get(name) if kept is not None else None
            if isinstance(found, Result):
                self._done[name] = found
                shown.step()

    @property
    def missing(self) -> bool:
        """Whether there are weights still to do."""
        return len(self._done) < len(self._names)

    def __contains__(self, name: str) -> bool:
        return name in self._done

    def __getitem__(self, name: str) -> Result:
        return self._done[name]

    def put(self, name: str, found: Result) -> None:
        """Keep a weight."""
        if name not in self._done:
            self.shown.step()
        self._done[name] = found
        if self._kept is not None:
            self._kept.put(name, found)


def weight_name(target: LinearTarget) -> str:
    """The name of a linear's weight."""
    return str(target.weight.target)
