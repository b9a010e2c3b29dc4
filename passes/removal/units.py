"""Units: what can only be removed together, as classes of elements along the dimensions of values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from graphwright.ir.program import Program
from graphwright.ir.types import TensorType


@dataclass(frozen=True)
class Axis:
    """A dimension of a value.

    Attributes:
        node: which makes the value; for a weight the first node that reads it.
        place: of the dimension, from the front.
    """

    node: fx.Node
    place: int


class Units:
    """Along dimensions of values, which unit each element belongs to.

    A unit is a number; numbers that were joined are one unit. The unit 0 is of what must stay.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.labels: dict[Axis, torch.Tensor] = {}
        self.reasons: list[tuple[torch.Tensor, str]] = []
        self.touched: list[fx.Node] = []
        self._parent = torch.zeros(1, dtype=torch.int64)
        self._first: dict[str, fx.Node] = {}
        for node in program.nodes:
            if node.op == "get_attr":
                self._first.setdefault(str(node.target), node)

    def axis(self, node: fx.Node, place: int) -> Axis:
        """A dimension, counted from the front or the back."""
        node = self._first[str(node.target)] if node.op == "get_attr" else node
        return Axis(node, place % len(self.shape(node)))

    def readers(self, node: fx.Node) -> list[fx.Node]:
        """All nodes that read a value; of a weight, whichever node they do it through."""
        if node.op != "get_attr":
            return list(node.users)
        same = [each for each in self.program.nodes if each.op == "get_attr" and each.target == node.target]
        return [user for each in same for user in each.users]

    def shape(self, node: fx.Node) -> tuple[int | str, ...]:
        """Sizes of a value; none for what is no tensor."""
        kind = self.program.type_of(node)
        return kind.shape if isinstance(kind, TensorType) else ()

    def size(self, axis: Axis) -> int:
        """How many elements there are along a dimension of fixed size."""
        size = self.shape(axis.node)[axis.place]
        assert isinstance(size, int)
        return size

    def has(self, axis: Axis) -> bool:
        """Whether anything is known along a dimension."""
        return axis in self.labels

    def of(self, axis: Axis) -> torch.Tensor:
        """The unit of every element, int64 ``[size]``; new units where nothing was known."""
        if axis not in self.labels:
            start = len(self._parent)
            fresh = torch.arange(start, start + self.size(axis))
            self._parent = torch.cat((self._parent, fresh))
            self.labels[axis] = fresh
            self.touched.append(axis.node)
        return self.roots(self.labels[axis])

    def roots(self, labels: torch.Tensor) -> torch.Tensor:
        """The units that numbers stand for by now."""
        while True:
            above = self._parent[labels]
            if torch.equal(above, labels):
                return labels
            labels = above

    def join(self, one: torch.Tensor, other: torch.Tensor) -> bool:
        """Make units one, pair by pair; says whether any were two."""
        differ = self.roots(one) != self.roots(other)
        for a, b in zip(one[differ].tolist(), other[differ].tolist(), strict=True):
            left, right = (int(self.roots(torch.tensor([each]))) for each in (a, b))
            self._parent[max(left, right)] = min(left, right)
        return bool(differ.any())

    def link(self, one: Axis, other: Axis, here: torch.Tensor | None = None, there: torch.Tensor | None = None) -> None:
        """Let element ``here[i]`` of a dimension and ``there[i]`` of another be of one unit; all in turn by default."""
        known = self.has(one), self.has(other)
        a, b = self.of(one), self.of(other)
        a, b = (a if here is None else a[here]), (b if there is None else b[there])
        joined = self.join(a, b)
        for axis, was in ((one, known[0]), (other, known[1])):
            if was and joined:
                self.touched.append(axis.node)

    def merge(self, axis: Axis, groups: torch.Tensor) -> None:
        """Make one unit of the elements in each row of ``groups``, int64 ``[n, elements]``."""
        labels = self.of(axis)[groups]
        self.join(labels[:, :1].expand_as(labels).flatten(), labels.flatten())

    def keep(self, axis: Axis, reason: str) -> None:
        """Say that everything along a dimension must stay."""
        labels = self.of(axis)
        if bool((labels != 0).any()):
            self.reasons.append((labels[labels != 0], reason))
            self.join(labels, torch.zeros_like(labels))

    def reason(self, labels: torch.Tensor) -> str:
        """Why units must stay that were there at first."""
        wanted = set(labels.tolist())
        for kept, reason in self.reasons:
            if wanted & set(kept.tolist()):
                return reason
        # They were joined with others before these had to stay.
        return self.reasons[0][1] if self.reasons else "nothing says why"
