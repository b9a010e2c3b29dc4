"""Linears that read the same value into one with their weights stacked."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx, nn

from graphwright.ir.arguments import argument
from graphwright.ir.names import op_name
from graphwright.ir.pattern import Refusal
from graphwright.ir.program import Program
from graphwright.ir.provenance import PATH, path_of, tags_of
from graphwright.ir.pruned import follow
from graphwright.ir.rewriter import Rewriter
from graphwright.ir.scratch import stack
from graphwright.ir.types import fake_of
from graphwright.passes.base import Pass
from graphwright.passes.fusion.heads import given_back

_LINEAR = "aten.linear"
_QUANTIZED = frozenset(
    f"graphwright.{name}"
    for name in (
        *("linear_codebook", "linear_int8_dynamic", "linear_int8_static", "linear_nbits"),
        *("linear_sparse", "linear_sparse_dynamic", "linear_sparse_static"),
    )
)
_CACHED = "graphwright.cached_attention"
_ATTENTION = frozenset({"graphwright.attention", "aten.scaled_dot_product_attention", _CACHED})
_PRODUCTS = frozenset({"aten.matmul", "aten.bmm", "aten.mm", "aten.addmm", "aten.baddbmm", "aten.convolution"})
_ACTIVATIONS = frozenset(
    f"aten.{name}" for name in ("silu", "gelu", "relu", "sigmoid", "tanh", "elu", "mish", "softplus")
)

_ADAPTER = "adapter"

# An operand is followed back to its linear over at most this many operators.
_FARTHEST = 64


@dataclass(frozen=True)
class Group:
    """Linears to be merged, in the order in which their weights are stacked.

    Attributes:
        linears: ``aten.linear`` nodes that read the same value.
        name: of the module they become, such as ``qkv_proj``.
    """

    linears: tuple[fx.Node, ...]
    name: str

    @property
    def weights(self) -> tuple[Any, ...]:
        """The weights, in order; what the bucket of shared layers goes by."""
        return tuple(argument(node, "weight") for node in self.linears)


@dataclass(frozen=True, kw_only=True)
class MergeLinears(Pass):
    """What :class:`FuseQKV` and :class:`FuseGateUp` share."""

    before: ClassVar[tuple[str, ...]] = ("quantize-linears",)

    @abstractmethod
    def groups(self, program: Program) -> Iterator[Group | Refusal]:
        """The linears that belong together, and what looked so but does not."""

    def run(self, program: Program) -> bool:
        """Merge every group whose weights no one else reads; layers that share weights share the stacked ones."""
        selected = self.selected(program)
        refusals: list[Refusal] = []
        buckets: dict[tuple[Any, ...], list[Group]] = {}
        for found in self.groups(program):
            if isinstance(found, Refusal):
                refusals.append(found)
            elif found not in buckets.setdefault(found.weights, []):
                buckets[found.weights].append(found)
        merged = 0
        with program.edit() as rewriter:
            for bucket in buckets.values():
                reason = self._objection(program, bucket, selected)
                if reason is None:
                    merged += _merge(rewriter, bucket)
                    continue
                for group in bucket:
                    node = group.linears[0]
                    refusals.append(Refusal(self.name, node.name, path_of(node), reason, len(group.linears) + 1))
        program.notes["rewrites"] = program.notes.get("rewrites", 0) + merged
        program.notes["refusals"] = (*program.notes.get("refusals", ()), *refusals)
        return merged > 0

    def _objection(self, program: Program, bucket: Sequence[Group], selected: Callable[[fx.Node], bool]) -> str | None:
        linears = [node for group in bucket for node in group.linears]
        for node in linears:
            if not selected(node):
                return f"%{node.name} is not selected by where= / ignore="
            protected = tags_of(node) & self.respects
            if protected:
                return f"%{node.name} is tagged {', '.join(sorted(protected))}, which this pass leaves alone"
        # Groups that share weights may differ, as each has the tag of its repetition.
        if any(len({tags_of(node) for node in group.linears}) > 1 for group in bucket):
            return "the linears carry different tags"
        first = bucket[0].linears
        weights = [argument(node, "weight") for node in first]
        biases = [argument(node, "bias") for node in first]
        if any(len({argument(group.linears[k], "bias") for group in bucket}) > 1 for k in range(len(first))):
            return "the same weight is used with different biases"
        present = [bias for bias in biases if bias is not None]
        return (
            _unstored(weights, 2)
            or _unstored(present, 1)
            or _shared(weights + present, linears)
            or _tied(program, weights + present)
            or _unlike(program, weights)
            or _unlike(program, [*present, weights[0]])
        )


@dataclass(frozen=True, kw_only=True)
class FuseQKV(MergeLinears):
    """Make one linear of those that give an attention its query, key and value from the same input.

    Before::

        %query = aten.linear(%x, %attn_q_proj_weight)
        %key = aten.linear(%x, %attn_k_proj_weight)
        %value = aten.linear(%x, %attn_v_proj_weight)

    After::

        %qkv_proj = aten.linear(%x, %attn_qkv_proj_weight)
        %split = aten.split_with_sizes(%qkv_proj, [64, 32, 32], -1)
        %query = py.getitem(%split, 0)
        %key = py.getitem(%split, 1)
        %value = py.getitem(%split, 2)

    The weights are stacked in the order query, key, value and are named after the module that holds them:
    ``attn.q_proj.weight``, ``attn.k_proj.weight`` and ``attn.v_proj.weight`` become ``attn.qkv_proj.weight`` in the
    state dict, biases likewise. Where only key and value have the same input (cross-attention), it is ``kv_proj``. A
    missing bias counts as zeros if another of them has one. With a cache, key and value are what is appended to it.
    The new tensors are copies: until the model the program was traced from is let go, both are in memory. Attention
    has to be one operator, so run this after :class:`FuseAttention`, and before quantisation.

    Does not fire when

    - the linears read different values;
    - a weight is computed, or something else reads it too (tied weights), unless all its readers merge alike, as
      layers that share their weights do;
    - one weight is trainable and another is not, or they differ in dtype or device;
    - one of them is quantised already, or tagged ``adapter``, or they carry different tags;
    - query, key or value depend on other than exactly one linear. Adapters beside them do not count: they go on reading
      the same input, and are added to the parts. One that changes a linear's input does.
    """

    name: ClassVar[str] = "fuse-qkv"
    after: ClassVar[tuple[str, ...]] = ("fuse-attention",)

    def groups(self, program: Program) -> Iterator[Group | Refusal]:
        """Query, key and value of every attention, followed back to their linears."""
        for node in program.nodes:
            if op_name(node) not in _ATTENTION:
                continue
            found = [_linear_behind(operand) for operand in attention_operands(node)]
            reasons = [item for item in found if isinstance(item, str)]
            if reasons:
                yield Refusal(self.name, node.name, path_of(node), reasons[0], 2)
                continue
            linears = [item for item in found if isinstance(item, fx.Node)]
            if len(set(linears)) == 1:
                continue  # one linear already
            inputs = [given_back(program, argument(item, "input")) for item in linears]
            if len(set(inputs)) == 1 and len(set(linears)) == 3:
                yield Group(tuple(linears), "qkv_proj")
            elif inputs[1] is inputs[2] and linears[1] is not linears[2]:
                yield Group(tuple(linears[1:]), "kv_proj")
            elif linears[1] is not linears[2]:
                yield Refusal(self.name, node.name, path_of(node), "query, key and value read different values", 2)


@dataclass(frozen=True, kw_only=True)
class FuseGateUp(MergeLinears):
    """Make one linear of the two that give a gated feed-forward block its gate and its other factor.

    Before::

        %gate = aten.linear(%x, %mlp_gate_proj_weight)
        %up = aten.linear(%x, %mlp_up_proj_weight)
        %y = graphwright.gated_activation(%gate, %up, 'silu')

    After::

        %gate_up_proj = aten.linear(%x, %mlp_gate_up_proj_weight)
        %split = aten.split_with_sizes(%gate_up_proj, [96, 96], -1)
        %gate = py.getitem(%split, 0)
        %up = py.getitem(%split, 1)
        %y = graphwright.gated_activation(%gate, %up, 'silu')

    The product may also still be spelled out, ``mul(silu(gate), up)``. The weights are stacked gate first and named
    after the module that holds them, as by :class:`FuseQKV`: ``mlp.gate_proj.weight`` and ``mlp.up_proj.weight``
    become ``mlp.gate_up_proj.weight``. What is said there of biases, memory and order holds here too.

    Does not fire when

    - the linears read different values;
    - a weight is computed, or something else reads it too (tied weights), unless all its readers merge alike;
    - one weight is trainable and another is not, or they differ in dtype or device;
    - one of them is quantised already, or tagged ``adapter``, or they carry different tags;
    - a factor depends on other than exactly one linear.
    """

    name: ClassVar[str] = "fuse-gate-up"
    after: ClassVar[tuple[str, ...]] = ("fuse-gated-activation",)

    def groups(self, program: Program) -> Iterator[Group | Refusal]:
        """The factors of every gated activation, followed back to their linears."""
        for node in program.nodes:
            factors = _gate_and_up(program, node)
            if factors is None:
                continue
            found = [_linear_behind(factor) for factor in factors]
            reasons = [item for item in found if isinstance(item, str)]
            linears = [item for item in found if isinstance(item, fx.Node)]
            if reasons:
                yield Refusal(self.name, node.name, path_of(node), reasons[0], 2)
            elif linears[0] is linears[1]:
                continue  # one linear already
            elif given_back(program, argument(linears[0], "input")) is not given_back(
                program, argument(linears[1], "input")
            ):
                yield Refusal(self.name, node.name, path_of(node), "gate and up read different values", 2)
            else:
                yield Group(tuple(linears), "gate_up_proj")


def attention_operands(node: fx.Node) -> list[Any]:
    """Query, key and value of an attention; with a cache, the new ones."""
    if op_name(node) != _CACHED:
        return [argument(node, name) for name in ("query", "key", "value")]
    caches = [argument(node, name) for name in ("keys", "values")]
    return [argument(node, "query"), *(_appended(cache) for cache in caches)]


def _appended(cache: fx.Node) -> Any:
    return argument(cache, "new") if op_name(cache) == "graphwright.cache_append" else cache


def _gate_and_up(program: Program, node: fx.Node) -> tuple[Any, Any] | None:
    if op_name(node) == "graphwright.gated_activation":
        return argument(node, "gate"), argument(node, "up")
    if op_name(node) != "aten.mul.Tensor":
        return None
    for gate, up in (node.args[:2], node.args[1::-1]):
        if isinstance(gate, fx.Node) and isinstance(up, fx.Node) and op_name(gate) in _ACTIVATIONS:
            if op_name(given_back(program, up)) in (_LINEAR, *_QUANTIZED):
                return gate, up
    return None


def _linear_behind(value: Any) -> fx.Node | str:
    """The one linear that a value is computed from by operators on its features, or why there is none.

    Adapters are looked through: the value that stands without one is always the first operand of its nodes, and what
    lies beside reads the linear's input and output, which both stay.
    """
    linears: dict[fx.Node, None] = {}
    seen: set[fx.Node] = set()
    stack = [value]
    while stack:
        node = stack.pop()
        if not isinstance(node, fx.Node) or node in seen or node.op in ("get_attr", "placeholder"):
            continue
        seen.add(node)
        name = op_name(node)
        if _ADAPTER in tags_of(node) and name != _LINEAR:
            stack.append(node.args[0])
            continue
        if name in _QUANTIZED:
            return f"%{node.name} is quantised or compressed already: merge linears before that"
        if name == _LINEAR:
            linears[node] = None
        elif name not in _PRODUCTS and name not in _ATTENTION and len(seen) < _FARTHEST:
            stack.extend(node.all_input_nodes)
    if len(linears) != 1:
        count = "no linear" if not linears else f"{len(linears)} linears"
        return f"%{value.name} depends on {count}, not on one"
    return next(iter(linears))


# -- what speaks against it ------------------------------------------------------------------------------------------


def _unstored(tensors: Sequence[fx.Node], dims: int) -> str | None:
    for node in tensors:
        if node.op != "get_attr":
            return f"the weight %{node.name} is computed"
        if fake_of(node).dim() != dims:
            return f"{node.target} has {fake_of(node).dim()} dimensions, not {dims}"
    return None


def _shared(tensors: Sequence[fx.Node], linears: Sequence[fx.Node]) -> str | None:
    for node in tensors:
        for user in node.users:
            if user not in linears:
                return f"{node.target} is also read by %{user.name}"
    return None


def _parent(name: str) -> str:
    """What holds the module that holds a weight."""
    return ".".join(name.split(".")[:-2])


def _other_parents(program: Program, node: fx.Node) -> tuple[str, ...]:
    """What holds the modules in which a weight has further names."""
    return tuple(sorted(_parent(alias) for alias, name in program.aliases.items() if name == node.target))


def _tied(program: Program, tensors: Sequence[fx.Node]) -> str | None:
    """Further names are kept where whole blocks are used twice, so that the merged weight has them too."""
    wanted = _other_parents(program, tensors[0])
    for node in tensors:
        found = _other_parents(program, node)
        if found != wanted or len({str(item.target) for item in tensors}) < len(tensors):
            return f"{node.target} is tied to a weight of another name"
    return None


def _unlike(program: Program, tensors: Sequence[fx.Node]) -> str | None:
    values = [program.tensor(node) for node in tensors]
    kinds = {(value.dtype, value.device) for value in values}
    if len(kinds) > 1:
        return f"the weights differ in dtype or device: {', '.join(sorted({str(value.dtype) for value in values}))}"
    if len({(isinstance(value, nn.Parameter), value.requires_grad) for value in values}) > 1:
        return "one weight is trainable and another is not"
    return None


# -- merging ---------------------------------------------------------------------------------------------------------


def _merge(rewriter: Rewriter, bucket: Sequence[Group]) -> int:
    """Merge groups that read the same weights; returns how many."""
    program, first = rewriter.program, bucket[0].linears
    weights = [argument(node, "weight") for node in first]
    biases = [argument(node, "bias") for node in first]
    parents = [_common_parent(weights), *_other_parents(program, weights[0])]
    name = _free_name(program, parents, bucket[0].name)
    modules = [f"{parent}.{name}" if parent else name for parent in parents]
    sizes = [int(fake_of(node).shape[0]) for node in weights]
    weight = _store(rewriter, modules, "weight", _stacked(program, weights, sizes), first[0])
    follow(program, [str(node.target) for node in weights], str(weight.target), program.tensor(weight))
    bias = None
    if any(item is not None for item in biases):
        bias = _store(rewriter, modules, "bias", _stacked(program, biases, sizes), first[0])
    for group in bucket:
        _merge_one(rewriter, group, weight, bias, sizes, modules[0])
    return len(bucket)


def _merge_one(
    rewriter: Rewriter, group: Group, weight: fx.Node, bias: fx.Node | None, sizes: list[int], module: str
) -> None:
    first = min(group.linears)
    source = argument(first, "input")
    name = module.rpartition(".")[2]
    linear = rewriter.call(_LINEAR, source, weight, bias, like=first, name=name)
    split = rewriter.call("aten.split_with_sizes", linear, sizes, -1, like=first)
    linear.meta[PATH] = module
    for place, old in enumerate(group.linears):
        part = rewriter.call("py.getitem", split, place, like=old)
        split.meta[PATH] = part.meta[PATH] = module.rpartition(".")[0]
        rewriter.replace(old, part)


def _stacked(program: Program, nodes: Sequence[fx.Node | None], sizes: Sequence[int]) -> torch.Tensor:
    """Weights or biases one below the other, zeros where one is missing; a parameter if they are parameters."""
    values = [None if node is None else program.tensor(node) for node in nodes]
    like = next(value for value in values if value is not None)
    parts = [
        like.new_zeros(size) if value is None else value.detach() for value, size in zip(values, sizes, strict=True)
    ]
    stacked = stack(parts)
    return nn.Parameter(stacked, like.requires_grad) if isinstance(like, nn.Parameter) else stacked


def _store(rewriter: Rewriter, modules: Sequence[str], leaf: str, tensor: torch.Tensor, like: fx.Node) -> fx.Node:
    """A weight under the first module's name, and as an alias under the others'."""
    node = rewriter.weight(f"{modules[0]}.{leaf}", tensor, like=like)
    for module in modules[1:]:
        rewriter.program.aliases[f"{module}.{leaf}"] = str(node.target)
    return node


def _common_parent(weights: Sequence[fx.Node]) -> str:
    """What holds the modules of all the weights."""
    found: list[str] = []
    for parts in zip(*(_parent(str(node.target)).split(".") for node in weights)):
        if len(set(parts)) > 1:
            break
        found.append(parts[0])
    return ".".join(found)


def _free_name(program: Program, parents: Sequence[str], name: str) -> str:
    """A name of a module that is free under all parents, with a number where it is not."""
    taken = {*program.tensors(), *program.aliases}
    wanted, number = name, 1
    while any(item.startswith(f"{parent}.{wanted}.".lstrip(".")) for item in taken for parent in parents):
        wanted, number = f"{name}_{number}", number + 1
    return wanted
