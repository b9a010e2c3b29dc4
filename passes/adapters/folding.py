"""Adapters that stay beside the weights, made ready for inference: what needs no input is computed beforehand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from graphwright.ir.arguments import argument
from graphwright.ir.errors import InputError
from graphwright.ir.names import op_name
from graphwright.ir.pattern import Refusal
from graphwright.ir.program import Program
from graphwright.ir.provenance import path_of, tags_of
from graphwright.ir.rewriter import Rewriter
from graphwright.ir.types import TensorType
from graphwright.passes.adapters.builder import tag_of
from graphwright.passes.adapters.inserted import FOLDED, RECORD, adapter_of, checked_names, forget
from graphwright.passes.adapters.sites import ADAPTER
from graphwright.passes.base import Pass
from graphwright.passes.cleanup.constant_folding import bytes_of, constant_cones, constant_value
from graphwright.passes.contract import Contract, Exact
from graphwright.passes.verification.precise import run_node

# What storing a weight anew may make of a value, in epsilons of its dtype; as for merging.
_STORED = 32.0
# What only says how a tensor is seen costs nothing, so it is no reason to store it anew.
_VIEWS = frozenset({"aten.t", "aten.unsqueeze", "aten.view"})


@dataclass(frozen=True, kw_only=True)
class FoldAdapters(Pass):
    """Compute beforehand what adapters compute from their own tensors, for programs that are not trained any more.

    ::

        %hidden = aten.linear(%x, %vera_A)
        %scaled = aten.mul.Tensor(%hidden, %vera_lambda_d)
        %wide = aten.linear(%scaled, aten.slice.Tensor(%vera_B, 0, 0, 16))
        %branch = aten.mul.Tensor(%wide, %vera_lambda_b)
        %adapted = aten.add.Tensor(%y, %branch)
        ->
        %hidden = aten.linear(%x, %vera_A)
        %branch = aten.linear(%hidden, %folded)         diag(b) B[:16] diag(d), computed in float64
        %adapted = aten.add.Tensor(%y, %branch)

    - What reads stored tensors only, such as DoRA's norms, OFT's rotations, LoHa's products and casts, becomes a stored
      tensor, rounded once; equal ones are stored once.
    - A factor, a number or one for each feature, goes into the weight of the branch's linear that alone reads the
      product, else into that of the branch's linear that it multiplies.
    - Two linears of a branch with nothing between them become one where that has no more numbers: ``A [r, in]`` and
      ``B [out, r]`` stay two if ``r (in + out) < in · out``.

    Weights of the base stay as they are. An adapter of which something was folded can no longer be trained, saved,
    merged or removed; it keeps its tags, so other passes leave it alone. DoRA's lengths are those of the weight as it
    is now: quantise before, not after.

    It does not fire on factors of what the base computes (IA3), which are merging's matter; on factors and products
    that would copy a weight of several places, such as VeRA's, beyond ``max_growth``; and on what depends on an input.
    An adapter of which nothing can be folded stays what it is.

    Attributes:
        adapters: names; ``None`` for all.
        max_growth: bytes by which a weight that takes in factors or another weight may exceed what that frees.
    """

    name: ClassVar[str] = "fold-adapters"
    contract: ClassVar[Contract] = Exact(stored=True)
    respects: ClassVar[frozenset[str]] = frozenset()

    adapters: tuple[str, ...] | None = None
    max_growth: int = 1 << 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.max_growth, bool) or not isinstance(self.max_growth, int) or self.max_growth < 0:
            raise InputError(f"must be a number of bytes, not {self.max_growth!r}", where=f"{self.name}: max_growth")
        object.__setattr__(self, "adapters", checked_names(self.name, self.adapters))

    def run(self, program: Program) -> bool:
        """Fold them.

        Raises:
            InputError: there is no adapter of a name, it has been merged, or its tensors are inputs.
        """
        folded = program.records.get(FOLDED, {})
        names = (*program.records.get(RECORD, {}), *folded) if self.adapters is None else self.adapters
        for name in names:
            if name not in folded:
                adapter_of(program, name)
        selected = self.selected(program)
        done: list[str] = []
        refusals: list[Refusal] = []
        with program.edit() as rewriter:
            for name in names:
                fold = _Fold(rewriter, name, selected, self.max_growth)
                fold.factors()
                fold.products()
                fold.constants()
                refusals += [Refusal(self.name, node.name, path_of(node), why) for node, why in fold.refused.items()]
                if fold.changed:
                    done.append(name)
                    _retire(rewriter, name)
        program.notes["refusals"] = (*program.notes.get("refusals", ()), *refusals)
        if done:
            program.notes["folded"] = done
        return bool(done)


class _Fold:
    """The folding of one adapter: weights become expressions of weights first, all of which are then stored."""

    def __init__(self, rewriter: Rewriter, name: str, selected: Callable[[fx.Node], bool], max_growth: int) -> None:
        self.rewriter, self.program = rewriter, rewriter.program
        self.name, self.selected, self.max_growth = name, selected, max_growth
        self.changed = False
        self.refused: dict[fx.Node, str] = {}
        self._cones = self._constants()

    def factors(self) -> None:
        """Move factors into the weights beside them."""
        for node in list(self.program.nodes):
            if node._erased or not self._is_own(node, "aten.mul.Tensor") or node in self._cones:
                continue
            value, factor = node.args[:2]
            if not isinstance(value, fx.Node) or not self._is_factor(node, value, factor):
                continue
            reader = next(iter(node.users)) if len(node.users) == 1 else None
            if reader is not None and self._is_own_linear(reader) and argument(reader, "input") is node:
                if self._is_affordable(node, argument(reader, "weight")):
                    self._into_reader(value, factor, reader)
            elif self._is_own_linear(value) and len(value.users) == 1:
                if self._is_affordable(node, argument(value, "weight")):
                    self._into_linear(value, factor, node)
            elif ADAPTER not in tags_of(value):
                self.refused[node] = (
                    "it is a factor of what the base computes, whose weights are left alone; MergeAdapters, in place "
                    "of folding, takes it in where its kind can be merged"
                )

    def products(self) -> None:
        """Make one linear of two, where that has no more numbers."""
        for node in list(self.program.nodes):
            while self._is_own_linear(node):
                first = argument(node, "input")
                if not self._is_own_linear(first) or len(first.users) > 1:
                    break
                a, b = argument(first, "weight"), argument(node, "weight")
                (rank, into), out = a.meta["val"].shape, b.meta["val"].shape[0]
                if rank * (into + out) < into * out:
                    break
                if not self._is_affordable(node, a, b):
                    break
                product = self._expression("aten.mm", b, a, like=node)
                inner, bias = argument(first, "bias"), argument(node, "bias")
                if inner is not None:
                    bias = self._expression("aten.linear", inner, b, bias, like=node)
                self._rewrite(node, argument(first, "input"), product, bias)

    def constants(self) -> None:
        """Store what weights alone determine, in float64 from the tensors as they were, rounded once."""
        cones, stored = self._constants(), dict[str, fx.Node]()
        spelled: dict[fx.Node, str] = {}
        for node in list(self.program.nodes):
            kind = self.program.type_of(node) if not node._erased and node in cones else None
            if not isinstance(kind, TensorType) or all(user in cones for user in node.users):
                continue
            if all(each.op == "get_attr" or op_name(each) in _VIEWS for each in cones[node]):
                continue
            key = _spelled(node, spelled)
            if key not in stored:
                # not kept for the next: in float64 all of a model's would be twice the adapter
                value = constant_value(self.program, node, {}, lambda *call: run_node(self.program, *call))
                path = path_of(node)
                label = f"{path}.folded.{self.name}" if path else f"folded.{self.name}"
                stored[key] = self.rewriter.weight(label, value.to(kind.dtype), like=node)
            self.rewriter.replace(node, stored[key])
            self._note(stored[key])

    def _constants(self) -> dict[fx.Node, set[fx.Node]]:
        """The adapter's nodes that no input influences, each with everything it is computed from."""

        def objection(node: fx.Node, cone: set[fx.Node]) -> str | None:
            if not self._is_own(node, op_name(node)):
                return "another's"
            if any(user.op == "output" for user in node.users):
                return "a result of the program"
            return None if bytes_of(self.program.type_of(node)) is not None else "several values"

        return constant_cones(self.program, objection)[0]

    def _is_own(self, node: fx.Node, op: str) -> bool:
        return op_name(node) == op and tag_of(self.name) in tags_of(node) and self.selected(node)

    def _is_constant(self, item: Any) -> bool:
        return isinstance(item, fx.Node) and (item.op == "get_attr" or item in self._cones)

    def _is_own_linear(self, node: fx.Node) -> bool:
        """Whether a node is a linear of the adapter, on a weight that no input influences."""
        if node._erased or not self._is_own(node, "aten.linear") or node in self._cones:
            return False
        weight, bias = argument(node, "weight"), argument(node, "bias")
        return self._is_constant(weight) and weight.meta["val"].dim() == 2 and (bias is None or self._is_constant(bias))

    def _is_factor(self, node: fx.Node, value: fx.Node, factor: Any) -> bool:
        """Whether ``node`` is ``value`` times a number, or times one number for each feature."""
        if self.program.type_of(node) != self.program.type_of(value):
            return False
        if not isinstance(factor, fx.Node):
            return isinstance(factor, int | float)
        like = factor.meta["val"]
        return self._is_constant(factor) and like.dim() <= 1 and like.dtype == value.meta["val"].dtype

    def _is_affordable(self, node: fx.Node, *weights: fx.Node) -> bool:
        """Whether the product of weights, in place of what several places may share, stays within ``max_growth``."""
        first, last = weights[0].meta["val"], weights[-1].meta["val"]
        size, leaves = last.shape[0] * first.shape[1] * first.dtype.itemsize, set[fx.Node]()
        for weight in weights:
            leaves |= {each for each in self._cones.get(weight, {weight}) if each.op == "get_attr"}
        own = [leaf for leaf in leaves if len({path_of(user) for user in leaf.users}) == 1 and ADAPTER in tags_of(leaf)]
        growth: int = size - sum(bytes_of(self.program.type_of(leaf)) or 0 for leaf in own)
        if growth > self.max_growth:
            self.refused[node] = (
                f"a weight that several places share would be copied: it grows by {growth} bytes; max_growth is "
                f"{self.max_growth}"
            )
        return growth <= self.max_growth

    def _into_reader(self, value: fx.Node, factor: Any, reader: fx.Node) -> None:
        """``(c ⊙ v) Wᵀ = v (W diag(c))ᵀ``."""
        weight = self._expression("aten.mul.Tensor", argument(reader, "weight"), factor, like=reader)
        self._rewrite(reader, value, weight, argument(reader, "bias"))

    def _into_linear(self, linear: fx.Node, factor: Any, product: fx.Node) -> None:
        """``c ⊙ (x Wᵀ + b) = x (diag(c) W)ᵀ + c ⊙ b``."""
        rows = factor
        if isinstance(factor, fx.Node) and factor.meta["val"].dim() == 1:
            rows = self._expression("aten.unsqueeze", factor, 1, like=linear)
        weight = self._expression("aten.mul.Tensor", argument(linear, "weight"), rows, like=linear)
        bias = argument(linear, "bias")
        if bias is not None:
            bias = self._expression("aten.mul.Tensor", bias, factor, like=linear)
        # a new node: the factor may be computed behind the linear
        tags = tuple(tags_of(product))
        new = self.rewriter.call("aten.linear", argument(linear, "input"), weight, bias, like=linear, tags=tags)
        self.rewriter.replace(product, new)
        self._note(new)

    def _expression(self, op: str, *operands: Any, like: fx.Node) -> fx.Node:
        """A new node of weights alone."""
        node = self.rewriter.call(op, *operands, like=like)
        sources = node.all_input_nodes
        self._cones[node] = {node}.union(*(self._cones.get(source, {source}) for source in sources))
        return node

    def _rewrite(self, linear: fx.Node, x: fx.Node, weight: fx.Node, bias: fx.Node | None) -> None:
        self.rewriter.set_arguments(linear, x, weight, bias)
        self._note(linear)

    def _note(self, node: fx.Node) -> None:
        """Note a node that gives what it gave, but for the rounding of weights."""
        self.changed = True
        dtype = node.meta["val"].dtype
        if dtype.is_floating_point:
            self.program.notes.setdefault("local_limits", {})[node.name] = _STORED * torch.finfo(dtype).eps


def _retire(rewriter: Rewriter, name: str) -> None:
    """Write down that an adapter is folded, and take what is left of it from training."""
    program = rewriter.program
    for node in program.nodes:
        if node.op == "get_attr" and tag_of(name) in tags_of(node):
            rewriter.freeze(str(node.target))
    if name in program.records.get(RECORD, {}):
        program.records.setdefault(FOLDED, {})[name] = program.records[RECORD][name]
        forget(program, name)


def _spelled(node: fx.Node, known: dict[fx.Node, str]) -> str:
    """A node of weights alone as text, the same for the same computation."""
    if node.op == "get_attr":
        return f"%{node.target}"
    if node not in known:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: _Text(_spelled(source, known)))
        known[node] = f"{node.target}({args}, {kwargs})"
    return known[node]


class _Text(str):
    """Text that is written without quotes."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)
