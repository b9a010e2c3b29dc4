"""How sparse the linears of a program are, and whether their masks are intact."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphwright.ir.arguments import arguments_of
from graphwright.ir.names import op_name
from graphwright.ir.ops.sparse import unpack_mask
from graphwright.ir.program import Program
from graphwright.ir.provenance import path_of
from graphwright.ir.pruned import mask_digest, pruned_weights
from graphwright.ir.sparsity import SparsityPattern
from graphwright.ir.types import VAL
from graphwright.passes.sparsity.targets import HELD

_WEIGHTS = ("weight", "qweight", "mat2", "other")


@dataclass(frozen=True)
class LinearSparsity:
    """One weight of linears.

    Attributes:
        weight: its name; of its codes, where it is packed, of its mask, where it is compressed.
        path: module path of the first linear that reads it.
        parameters: how many numbers it has.
        sparsity: fraction of them that are exactly 0; of those that its mask leaves, where one is held.
        pattern: that its zeros were pruned to; ``None`` where it was not pruned.
        held: its mask is held for training.
        intact: its zeros are those that were pruned; ``None`` where it was not pruned.
    """

    weight: str
    path: str
    parameters: int
    sparsity: float
    pattern: str | None
    held: bool
    intact: bool | None


@dataclass(frozen=True)
class SparsityDescription:
    """Every weight of a program's linears. Prints as a table.

    Attributes:
        linears: in the program's order.
    """

    linears: tuple[LinearSparsity, ...]

    @property
    def parameters(self) -> int:
        """Of all together."""
        return sum(row.parameters for row in self.linears)

    @property
    def sparsity(self) -> float:
        """Of all together."""
        return sum(row.sparsity * row.parameters for row in self.linears) / max(1, self.parameters)

    def __str__(self) -> str:
        from graphwright.passes.rendering.terminal import plain_text

        return plain_text(self.__rich__())

    def __rich__(self) -> Any:
        from graphwright.passes.rendering.terminal import columns

        title = f"{self.sparsity:.1%} of {self.parameters} weights in {len(self.linears)} matrices are 0"
        rows = [
            [
                row.weight,
                row.pattern or "–",
                "held" if row.held else "" if row.intact is None else "intact" if row.intact else "CHANGED",
                str(row.parameters),
                f"{row.sparsity:.1%}",
            ]
            for row in self.linears
        ]
        return columns(title, ["weight", "pattern", "mask", "parameters", "sparsity"], rows, left=3)


def describe_sparsity(program: Program) -> SparsityDescription:
    """How sparse the weights of a program's linears are, pruned or not, packed or not.

    A mask is intact when the zeros of its weight are exactly those that the records have a digest of, and keep to its
    pattern.
    """
    known = pruned_weights(program)
    rows: dict[str, LinearSparsity] = {}
    for node in program.nodes:
        found = _zeros(program, node)
        if found is None or found[0] in rows:
            continue
        name, nonzero, held, turned = found
        entry = known.get(name)
        intact = None
        if entry is not None:
            pattern = SparsityPattern.of(entry.pattern, where=f"the record of weight {name!r}")
            stepped = nonzero.t() if turned else nonzero
            intact = mask_digest(nonzero) == entry.digest and _keeps(pattern, stepped)
        rows[name] = LinearSparsity(
            name,
            path_of(node),
            nonzero.numel(),
            1 - int(nonzero.sum()) / max(1, nonzero.numel()),
            entry.pattern if entry is not None else None,
            held,
            intact,
        )
    return SparsityDescription(tuple(rows.values()))


def _keeps(pattern: SparsityPattern, nonzero: torch.Tensor) -> bool:
    """Whether zeros keep to a pattern; a weight that was kept may be 0 all the same, so blocks need not be whole."""
    if pattern.among:
        return pattern.holds(nonzero)
    return pattern.objection(nonzero.shape) is None


def _zeros(program: Program, node: fx.Node) -> tuple[str, torch.Tensor, bool, bool] | None:
    """A linear's weight by name, where it is not 0 as it is stored, whether a mask is held, and whether it is stored
    ``[in, out]``; ``None`` for other nodes."""
    name = op_name(node)
    plain = name in ("aten.linear", "aten.addmm", "aten.mm", "aten.matmul")
    if not plain and not name.startswith("graphwright.linear_"):
        return None
    given = arguments_of(node)
    if name.startswith("graphwright.linear_sparse"):
        if given["mask"].op != "get_attr":
            return None
        bits, columns = program.tensor(given["mask"]), int(given["x"].meta[VAL].shape[-1])
        return str(given["mask"].target), unpack_mask(bits, columns), False, False
    weight = next((given[key] for key in _WEIGHTS if isinstance(given.get(key), fx.Node)), None)
    if weight is None:
        return None
    if op_name(weight) == HELD:
        held = arguments_of(weight)
        weight, mask = held["weight"], program.tensor(held["mask"])
        return str(weight.target), mask & (program.tensor(weight).detach() != 0), True, name != "aten.linear"
    if weight.op != "get_attr":
        return None
    if plain:
        stored = program.tensor(weight).detach()
        if stored.dim() != 2 or not stored.is_floating_point():
            return None
        return str(weight.target), stored != 0, False, name != "aten.linear"
    return str(weight.target), packed_values(program, node) != 0, False, False


def packed_values(program: Program, node: fx.Node) -> torch.Tensor:
    """What the codes of a packed linear stand for, ``[out, in]`` floating."""
    from graphwright.passes.adapters.packed import PackedBase  # that package knows this one

    return PackedBase.at(program, node).dense(program)
