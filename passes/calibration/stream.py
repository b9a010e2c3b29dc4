"""Calibration data on its way through a program: all batches go one stretch, then all go the next.

So what a layer sees can be looked at before the layer is changed, and what the changed layer gives is what the next one
sees, while every operator runs once for each batch and no more than a stretch's weights are in use. Between stretches
the values that later nodes read lie in a :class:`ValueStore`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from graphwright.ir.decoder import DecoderLayout
from graphwright.ir.errors import InputError, ProgramError
from graphwright.ir.mapped import release
from graphwright.ir.program import Program
from graphwright.passes.calibration.batches import Batch, flatten
from graphwright.passes.calibration.steps import without_caches
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
            batches: arguments of one call each; for a decoding step, texts (see
                :func:`graphwright.passes.calibration.batches.flatten`).
            mask_input: name of the input ``[batch, positions]`` that is 0 at padding, whose positions :meth:`rows`
                leaves out; ``None``, or a name the program does not have: nothing is left out.

        Raises:
            InputError: there is no batch, or one does not fit the program; it is numbered.
        """
        self._take(program)
        decoder = DecoderLayout.find(self.program)
        names = self.program.signature.names
        for index, batch in enumerate(batches):
            flat, mask = flatten(self.program, batch, index, decoder)
            if mask is None and mask_input in names:
                mask = _mask_of(flat[names.index(mask_input)])
            self._masks.append(mask)
            for node, value in zip(self.program.inputs, flat, strict=True):
                self._values.put(index, node.name, value)
        if not self._masks:
            raise InputError("there is no calibration data", hint="give at least one batch")

    def _take(self, program: Program) -> None:
        self.program = program.clone()
        if DecoderLayout.find(self.program) is not None:
            without_caches(self.program)
        self._nodes = self.program.nodes
        self._by_name = {node.name: node for node in self._nodes}
        self._place = {node: place for place, node in enumerate(self._nodes)}
        self._last = {node: max((self._place[user] for user in node.users), default=-1) for node in self._nodes}
        self._last_read: dict[str, int] = {}  # of weights; several nodes may stand for one
        for node in self._nodes:
            if node.op == "get_attr":
                name = str(node.target)
                self._last_read[name] = max(self._last[node], self._last_read.get(name, -1))
        self._position = 0
        self._values = ValueStore()
        self._masks: list[torch.Tensor | None] = []
        self._weights: dict[str, torch.Tensor] = {}

    def fork(self) -> Stream:
        """Another stream of the same batches, without reading them again: a loader that shuffles gives others.

        Raises:
            ProgramError: the batches have been moved.
        """
        self._require_start()
        other = Stream.__new__(Stream)
        other._take(self.program)
        other._masks = list(self._masks)
        for batch in range(self.batches):
            for node in self.program.inputs:
                other._values.put(batch, node.name, self.value(node, batch))
        return other

    def digest(self) -> str:
        """A digest of the batches as the program takes them, by which the same data is known again.

        Raises:
            ProgramError: the batches have been moved.
        """
        self._require_start()
        found = hashlib.blake2b(digest_size=16)
        for batch in range(self.batches):
            for node in self.program.inputs:
                value = self.value(node, batch)
                found.update(f"{node.name} {value.dtype} {list(value.shape)}".encode())
                found.update(_distinct(value).contiguous().view(torch.uint8).numpy().data)
        return found.hexdigest()

    def _require_start(self) -> None:
        if self._position:
            raise ProgramError("the calibration data has already been moved through the program")

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
                del values, result  # before those of the next batch come
        for name in {str(each.target) for node in stretch for each in node.all_input_nodes if each.op == "get_attr"}:
            release(self.program.tensor(name))
            if self._last_read[name] < end:
                self._weights.pop(name, None)

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
        """The value that a live node, or a weight, has in a batch.

        Raises:
            ProgramError: it is not known: not computed yet, or no longer needed.
        """
        if node.op == "get_attr":
            return self._weights.get(str(node.target), self.program.tensor(str(node.target)))
        try:
            return self._values.get(batch, node.name)
        except KeyError:
            what = "its value is not known where the calibration data stands"
            raise ProgramError(what, where=f"%{node.name}") from None

    def ahead(self, nodes: Sequence[fx.Node], batch: int) -> dict[fx.Node, Any]:
        """Values of the calls that come next, for a batch that stays where it is, besides those known.

        Args:
            nodes: of the copy: calls from where the batches stand on, in order.
            batch: its number.
        """
        values = {node: self.value(node, batch) for node in self.live()}
        with torch.no_grad():
            return run_nodes(self.program, nodes, values, self._weights)

    def rows(self, node: fx.Node) -> Iterator[torch.Tensor]:
        """Values of a live node as float32 rows ``[n, features]``, batch by batch, without padding."""
        for batch in range(self.batches):
            yield self.without_padding(self.value(node, batch).detach(), batch).to(torch.float32)

    def without_padding(self, value: torch.Tensor, batch: int) -> torch.Tensor:
        """Rows ``[n, features]`` of a value ``[..., features]``, except at padding where it has a row per position:
        ``[batch, positions, features]``, or the same with all positions in one dimension."""
        mask = self._masks[batch]
        if mask is None:
            return value.reshape(-1, value.shape[-1])
        if value.shape[:-1] == mask.shape:
            return value[mask]
        if value.dim() == 2 and len(value) == mask.numel():
            return value[mask.flatten()]
        return value.reshape(-1, value.shape[-1])


def _distinct(value: torch.Tensor) -> torch.Tensor:
    """The elements of a tensor, ``[n]``; of one that repeats its memory, each piece of memory once."""
    stored = value.untyped_storage()
    if value.nbytes <= stored.nbytes():
        return value.detach().reshape(-1)
    return torch.empty(0, dtype=value.dtype).set_(stored)


def _mask_of(value: torch.Tensor) -> torch.Tensor | None:
    """Where an input says there is no padding; ``None`` for masks of other kinds, such as those added to scores."""
    if value.dim() != 2 or (value.is_floating_point() and bool((value < 0).any())):
        return None
    return value.to(torch.bool)


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
