"""Cutting units out of a program: narrower weights, and the sizes that operators have as constants."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import fx

from graphwright.ir.arguments import arguments_of, canonical_call
from graphwright.ir.names import op_name, resolve_target
from graphwright.ir.program import Program
from graphwright.ir.rewriter import Rewriter
from graphwright.ir.types import VAL, TensorType
from graphwright.passes.quantization.equivalence.groups import readers_of
from graphwright.passes.removal.operators import ATTENTION, NORMS, SPLITS, slice_start
from graphwright.passes.removal.units import Axis, Units


def cut(program: Program, units: Units, gone: Collection[int], *, exact_norms: bool) -> None:
    """Take units out of a program, all or nothing.

    Args:
        program: changed in place.
        units: where they lie.
        gone: the units.
        exact_norms: let layer norms compute what they did of zeros in the removed places, spelled out.
    """
    _Cut(program, units, gone).run(exact_norms=exact_norms)


class _Cut:
    def __init__(self, program: Program, units: Units, gone: Collection[int]) -> None:
        self.program, self.units = program, units
        away = torch.tensor(sorted(gone), dtype=torch.int64)
        self.kept: dict[Axis, torch.Tensor] = {}
        for axis in units.labels:
            stays = ~torch.isin(units.of(axis), away)
            if not bool(stays.all()):
                self.kept[axis] = stays

    def run(self, *, exact_norms: bool) -> None:
        """Cut weights and constants, then compute all types anew."""
        norms = [node for node in self.program.nodes if op_name(node) in NORMS and self._counts(node)[-1] is not None]
        widths = {node: self.units.shape(node)[-1] for node in norms}
        with self.program.edit() as rewriter:
            for node in self.program.nodes:
                if node.op == "call_function":
                    self._constants(node)
            for node in norms:
                self._norm(rewriter, node, int(widths[node]))
            for axis in self.kept:
                if axis.node.op == "get_attr":
                    self._weight(rewriter, axis.node)
                elif axis.node.op == "placeholder":
                    self._input(axis.node)
            rewriter.changed = True
            rewriter.retype()
            for node in norms:
                if exact_norms and op_name(node) == "aten.layer_norm":
                    _spell_out(rewriter, node, int(widths[node]))

    def _counts(self, node: fx.Node) -> list[int | None]:
        """What is left along each dimension of a value, where something goes."""
        found: list[int | None] = []
        for place in range(len(self.units.shape(node))):
            stays = self.kept.get(self.units.axis(node, place))
            found.append(None if stays is None else int(stays.sum()))
        return found

    def _input(self, node: fx.Node) -> None:
        """A cache of fewer heads."""
        kind = self.program.type_of(node)
        assert isinstance(kind, TensorType)
        shape = [size if left is None else left for size, left in zip(kind.shape, self._counts(node), strict=True)]
        node.meta[VAL] = self.program.symbols.fake(TensorType(kind.dtype, tuple(shape)))

    def _weight(self, rewriter: Rewriter, node: fx.Node) -> None:
        old = self.program.tensor(node)
        tensor = old.detach()
        for place in range(tensor.dim()):
            stays = self.kept.get(self.units.axis(node, place))
            if stays is not None and len(stays) == tensor.shape[place]:
                tensor = tensor.index_select(place, stays.nonzero().flatten())
        if tensor.shape != old.shape:
            rewriter.rebind(node, tensor.contiguous(), retyped=True)

    def _constants(self, node: fx.Node) -> None:
        """The sizes that an operator has as numbers."""
        name, given, counts = op_name(node), arguments_of(node), self._counts(node)
        changed: dict[str, Any] = {}
        if name in ("aten.view", "aten.reshape", "aten._unsafe_view", "aten.expand"):
            key = "shape" if "shape" in given else "size"
            lead = len(counts) - len(given[key])
            changed[key] = [
                size if counts[lead + place] is None or size == -1 else counts[lead + place]
                for place, size in enumerate(given[key])
            ]
        elif name == "aten.unflatten.int":
            start = given["dim"] % len(self.units.shape(node.all_input_nodes[0]))
            changed["sizes"] = [
                size if counts[start + place] is None or size == -1 else counts[start + place]
                for place, size in enumerate(given["sizes"])
            ]
        elif name == "aten.layer_norm" or (name == "aten.rms_norm" and "normalized_shape" in given):
            if counts[-1] is not None:
                changed["normalized_shape"] = [counts[-1]]
        elif name == "aten.slice.Tensor":
            changed = self._slice(node, given)
        elif name in SPLITS:
            self._split(node, given)
        elif name in ATTENTION and given.get("scale", 0) is None:
            query = given["query"]
            if self._counts(query)[-1] is not None:
                changed["scale"] = 1 / math.sqrt(int(self.units.shape(query)[-1]))
        if any(given[key] != value for key, value in changed.items()):
            self._set(node, node.target, {**given, **changed})

    def _slice(self, node: fx.Node, given: dict[str, Any]) -> dict[str, Any]:
        source = node.all_input_nodes[0]
        axis = self.units.axis(source, given["dim"])
        stays = self.kept.get(axis)
        if stays is None:
            return {}
        start = slice_start(given["start"], len(stays))
        end = start + self.units.size(self.units.axis(node, given["dim"]))
        return {"start": int(stays[:start].sum()), "end": int(stays[:end].sum())}

    def _split(self, node: fx.Node, given: dict[str, Any]) -> None:
        source = node.all_input_nodes[0]
        place = given["dim"] % len(self.units.shape(source))
        stays = self.kept.get(Axis(source, place))
        if stays is None:
            return
        sizes = [int(part.shape[place]) for part in node.meta["val"]]
        left = [int(part.sum()) for part in stays.split(sizes)]
        arguments = {"self": source, "split_sizes": left, "dim": given["dim"]}
        self._set(node, resolve_target("aten.split_with_sizes"), arguments)

    def _set(self, node: fx.Node, target: Any, arguments: dict[str, Any]) -> None:
        spelled = target._schema.arguments
        positional = tuple(arguments[item.name] for item in spelled if not item.kwarg_only)
        keywords = {item.name: arguments[item.name] for item in spelled if item.kwarg_only}
        node.target = target
        node.args, node.kwargs = canonical_call(target, positional, keywords)

    def _norm(self, rewriter: Rewriter, node: fx.Node, width: int) -> None:
        """A norm without mean: over fewer features, of which the removed ones are zero.

        ``x w / sqrt(Σx²/n + ε)`` is ``x w sqrt(n/m) / sqrt(Σx²/m + ε n/m)`` for m features that are left of n.
        """
        if op_name(node) == "aten.layer_norm":
            return
        given, count = arguments_of(node), self._counts(node)[-1]
        assert count is not None
        ratio, weight = width / count, given["weight"]
        if given["eps"] is None:
            x = given["input"]
            given["eps"] = torch.finfo(x.meta["val"].dtype).eps
        changed: dict[str, Any] = {"eps": given["eps"] * ratio}
        own = weight is not None and weight.op == "get_attr" and readers_of(self.program, weight) == [node]
        if own:
            old = self.program.tensor(weight).detach()
            rewriter.rebind(weight, (old.double() * math.sqrt(ratio)).to(old.dtype))
        self._set(node, node.target, {**given, **changed})
        if not own:
            with self.program.graph.inserting_after(node):
                scaled = self.program.graph.call_function(resolve_target("aten.mul.Tensor"), (node, math.sqrt(ratio)))
            scaled.meta = dict(node.meta)
            node.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)


def _spell_out(rewriter: Rewriter, node: fx.Node, width: int) -> None:
    """A layer norm over features of which some were removed: what it makes of the rest when those are zero.

    With the sum S of those that are left, and m of n left: the mean is ``S/n``, the variance ``(Σ(x - S/n)² + (n - m)
    (S/n)²) / n``.
    """
    given = arguments_of(node)
    count = int(given["normalized_shape"][0])

    def call(target: str, *args: Any) -> fx.Node:
        return rewriter.call(target, *args, like=node)

    mean = call("aten.mul.Tensor", call("aten.sum.dim_IntList", given["input"], [-1], True), 1 / width)
    centred = call("aten.sub.Tensor", given["input"], mean)
    squares = call("aten.sum.dim_IntList", call("aten.mul.Tensor", centred, centred), [-1], True)
    absent = call("aten.mul.Tensor", call("aten.mul.Tensor", mean, mean), float(width - count))
    variance = call("aten.mul.Tensor", call("aten.add.Tensor", squares, absent), 1 / width)
    result = call("aten.mul.Tensor", centred, call("aten.rsqrt", call("aten.add.Tensor", variance, given["eps"])))
    if given["weight"] is not None:
        result = call("aten.mul.Tensor", result, given["weight"])
    if given["bias"] is not None:
        result = call("aten.add.Tensor", result, given["bias"])
    rewriter.replace(node, result, equivalent=False)
