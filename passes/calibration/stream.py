"""Calibration data on its way through a program: all batches go one stretch, then all go the next.

So what a layer sees can be looked at before the layer is changed, and what the changed layer gives is what the next one
sees, while every operator runs once for each batch and no more than a stretch's weights are in use. Between stretches
the values that later nodes read lie in a :class:`ValueStore`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from graphwright.ir.errors import InputError
from graphwright.ir.mapped import release
from graphwright.ir.program import Program
from graphwright.passes.calibration.batches import Batch, flatten
from graphwright.passes.calibration.store import ValueStore


class Stream:
    """Where all batches stand in a program.

    It works on a copy of the program, which shares the weights: rewriting the program does not disturb it. Nodes of
    either may be given.

    Attributes:
        program: the copy.
        batches: how many there are.
    """

    def __init__(
        self, program: Program, batches: Iterable[Batch], *, mask_input: str | None = "attention_mask"
    ) -> None:
        """Take the batches in.

        Args:
            program: what they run through.
            batches: arguments of one call each.
            mask_input: name of the input that is 0 at padding, whose positions :meth:`rows` leaves out; ``None``, or a
                name the program does not have: nothing is left out.

        Raises:
            InputError: there is no batch, or one does not fit the program; it is numbered.
        """
        self.program = program.clone()
        self._nodes = self.program.nodes
        self._by_name = {node.name: node for node in self._nodes}
        self._place = {node: place for place, node in enumerate(self._nodes)}
        self._last = {node: max((self._place[user] for user in node.users), default=-1) for node in self._nodes}
        self._position = 0
        self._values = ValueStore()
        self._masks: list[torch.Tensor | None] = []
        self._weights: dict[str, torch.Tensor] = {}
        names = self.program.signature.names
        for index, batch in enumerate(batches):
            flat = flatten(self.program, batch, index)
            self._masks.append(flat[names.index(mask_input)].to(torch.bool) if mask_input in names else None)
            for node, value in zip(self.program.inputs, flat, strict=True):
                self._values.put(index, node.name, value)
        if not self._masks:
            raise InputError("there is no calibration data", hint="give at least one batch")

    @property
    def batches(self) -> int:
        """How many there are."""
        return len(self._masks)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *error: object) -> None:
        self._values.close()

    # -- moving --------------------------------------------------------------------------------------------------------

    def replace_weight(self, name: str, weight: torch.Tensor) -> None:
        """Let calls that the batches have not passed yet read another tensor in place of a weight."""
        self._weights[name] = weight

    def advance(self, stop: fx.Node | None = None) -> None:
        """Run all batches up to a node, which is not run; up to the end for ``None``. Never backwards."""
        end = len(self._nodes) if stop is None else self._place[self.twin(stop)]
        if end <= self._position:
            return
        stretch = [node for node in self._nodes[self._position : end] if node.op == "call_function"]
        known, self._position = self.live(), end
        with torch.no_grad():
            for batch in range(self.batches):
                values = {node: self._values.get(batch, node.name) for node in known if self._is_read(node, stretch)}
                result = run_nodes(self.program, stretch, values, self._weights, free=True)
                for node in (*known, *stretch):
                    if self._last[node] < end:
                        self._values.drop(batch, node.name)
                    elif node in result and node not in known:
                        self._values.put(batch, node.name, result[node])
        for weight in {operand for node in stretch for operand in node.all_input_nodes if operand.op == "get_attr"}:
            release(self.program.tensor(weight))
            if self._last[weight] < end:
                self._weights.pop(str(weight.target), None)

    @staticmethod
    def _is_read(node: fx.Node, stretch: Sequence[fx.Node]) -> bool:
        return not node.users.keys().isdisjoint(stretch)

    # -- looking -------------------------------------------------------------------------------------------------------

    def twin(self, node: fx.Node) -> fx.Node:
        """The node of this name in the copy."""
        return self._by_name[node.name]

    def live(self) -> list[fx.Node]:
        """Nodes whose values are known here and read later, in order."""
        return [
            node
            for node in self._nodes
            if self._last[node] >= self._position
            and (node.op == "placeholder" or (node.op == "call_function" and self._place[node] < self._position))
        ]

    def weight(self, node: fx.Node) -> torch.Tensor:
        """The tensor that calls read at a ``get_attr`` node: its own, or what has replaced it."""
        replaced = self._weights.get(str(node.target))
        return replaced if replaced is not None else self.program.tensor(self.twin(node))

    def value(self, node: fx.Node, batch: int) -> Any:
        """The value that a live node has in a batch."""
        return self._values.get(batch, node.name)

    def rows(self, node: fx.Node) -> Iterator[torch.Tensor]:
        """Values of a live node as float32 rows ``[n, features]``, batch by batch, without padding."""
        for batch in range(self.batches):
            yield self.without_padding(self.value(node, batch), batch).to(torch.float32)

    def without_padding(self, value: torch.Tensor, batch: int) -> torch.Tensor:
        """Rows ``[n, features]`` of a value ``[..., features]``, except at padding where it has a row per position."""
        mask = self._masks[batch]
        if mask is not None and value.shape[:-1] == mask.shape:
            return value[mask]
        return value.reshape(-1, value.shape[-1])


def run_nodes(
    program: Program,
    nodes: Sequence[fx.Node],
    values: Mapping[fx.Node, Any],
    weights: Mapping[str, torch.Tensor] | None = None,
    *,
    free: bool = False,
) -> dict[fx.Node, Any]:
    """Run calls of a program in order; gradients flow if they are enabled.

    Args:
        program: whose nodes they are.
        nodes: calls; what they read comes before them or is in ``values``.
        values: of nodes that were run before.
        weights: tensors to read in place of the program's, by name.
        free: let go of values that only these nodes read as soon as the last of them has run.

    Returns:
        the values that are left, those given included.
    """
    found, instead = dict(values), weights or {}

    def operand(node: fx.Node) -> Any:
        if node.op != "get_attr":
            return found[node]
        return instead[str(node.target)] if node.target in instead else program.tensor(node)

    readers = {each: node for node in nodes for each in node.all_input_nodes}  # the last of them
    within = set(nodes)
    for node in nodes:
        args, kwargs = fx.node.map_arg(node.args, operand), fx.node.map_arg(node.kwargs, operand)
        function: Any = node.target
        found[node] = function(*args, **kwargs)
        if not free:
            continue
        for each in node.all_input_nodes:
            if readers[each] is node and each.op != "get_attr" and within.issuperset(each.users):
                found.pop(each, None)
    return found
