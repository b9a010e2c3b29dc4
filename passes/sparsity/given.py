"""The pass that prunes by masks that were made elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from graphwright.ir.errors import InputError
from graphwright.ir.program import Program
from graphwright.ir.sparsity import SparsityPattern
from graphwright.passes.base import Pass
from graphwright.passes.contract import Approximate, Contract
from graphwright.passes.quantization.targets import LinearTarget, linear_target
from graphwright.passes.sparsity.linears import PruneLinears
from graphwright.passes.sparsity.targets import check_unpacked
from graphwright.passes.sparsity.writing import write_pruned


@dataclass(frozen=True, kw_only=True)
class PruneByMasks(Pass):
    """Set weights to 0 where masks say so.

    ::

        %y = aten.linear(%x, %w, %b)
        ->
        %y = aten.linear(%x, %w, %b)      tagged "masked"; the values of %w are 0 where the mask is not set

    As :class:`PruneLinears` with somebody else's choice. It does not fire on weights that no mask is given for.

    Attributes:
        masks: by name of the weight, bool of its shape as it is stored: set where a weight stays.
        pattern: that every mask keeps to; it is checked.
    """

    name: ClassVar[str] = "prune-by-masks"
    contract: ClassVar[Contract] = Approximate(max_local_error=2.0)
    after: ClassVar[tuple[str, ...]] = PruneLinears.after
    before: ClassVar[tuple[str, ...]] = PruneLinears.before
    not_after: ClassVar[Mapping[str, str]] = PruneLinears.not_after

    masks: Mapping[str, torch.Tensor] = field(default_factory=dict, compare=False)
    pattern: str = "unstructured"

    def __post_init__(self) -> None:
        super().__post_init__()
        SparsityPattern.of(self.pattern, where=f"{self.name}: pattern")
        for name, mask in self.masks.items():
            if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
                kind = mask.dtype if isinstance(mask, torch.Tensor) else type(mask).__name__
                raise InputError(f"must be a bool tensor, not {kind}", where=f"{self.name}: masks[{name!r}]")

    def options(self) -> dict[str, Any]:
        """Options as JSON values; masks by the names of their weights."""
        found = super().options()
        if self.masks:
            found["masks"] = sorted(self.masks)
        return found

    def run(self, program: Program) -> bool:
        """Prune every weight that there is a mask for.

        Raises:
            InputError: a mask is of no linear's weight, of another shape, or not of the pattern; or its weight is
                packed or held.
        """
        pattern = SparsityPattern.of(self.pattern, where=f"{self.name}: pattern")
        chosen = self.selected(program)
        readers: dict[str, list[LinearTarget]] = {}
        for node in program.nodes:
            if node.op != "call_function" or not chosen(node):
                continue
            if self.masks:
                check_unpacked(self.name, node)
            found = linear_target(program, node)
            if isinstance(found, LinearTarget):
                readers.setdefault(str(found.weight.target), []).append(found)
        with program.edit() as rewriter:
            for name, mask in self.masks.items():
                place = f"{self.name}: masks[{name!r}]"
                if name not in readers:
                    raise InputError(
                        "is the mask of no linear's weight", where=place, hint="use the weight's name in state_dict()"
                    )
                targets, weight = readers[name], program.tensor(name).detach()
                if mask.shape != weight.shape:
                    raise InputError(f"is {list(mask.shape)}, the weight {list(weight.shape)}", where=place)
                if not pattern.holds(mask.t() if targets[0].transposed else mask):
                    raise InputError(f"does not keep to {pattern}", where=place)
                write_pruned(rewriter, targets, torch.where(mask, weight, 0), pattern)
            program.notes["weights"] = len(self.masks)
            return rewriter.changed
