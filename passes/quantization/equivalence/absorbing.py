"""What can absorb a factor for every feature of a value: the weights behind it that it is a product with."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import torch
from torch import fx

from graphwright.ir.arguments import arguments_of
from graphwright.ir.names import op_name
from graphwright.ir.program import Program
from graphwright.ir.provenance import tags_of
from graphwright.ir.types import TensorType
from graphwright.passes.quantization.equivalence import features
from graphwright.passes.quantization.equivalence.groups import gives_its_input, is_assertion, readers_of
from graphwright.passes.quantization.targets import LinearTarget, linear_target

_VIEWS = frozenset(
    f"aten.{name}" for name in ("view", "reshape", "_unsafe_view", "unsqueeze", "squeeze.dim", "flatten.using_ints")
)
_TRANSPOSES = frozenset({"aten.transpose.int", "aten.permute", "aten.t"})
_ATTENTION = frozenset({"graphwright.attention", "aten.scaled_dot_product_attention"})
_SPLITS = frozenset({"aten.split_with_sizes", "aten.split.Tensor", "aten.chunk"})
_NORMS = frozenset({"aten.layer_norm", "aten.rms_norm", "graphwright.rms_norm"})
_PRODUCTS = frozenset({"aten.matmul", "aten.bmm"})

# A value is followed back over at most this many operators.
_FARTHEST = 32


@dataclass(frozen=True)
class Edit:
    """A weight whose elements are multiplied with the factors of the features that its layout names."""

    weight: fx.Node
    layout: torch.Tensor


@dataclass
class Absorption:
    """How a value gets a factor for each feature.

    Attributes:
        features: how many there are.
        edits: weights to change.
        changed: nodes whose values change with them, from the first to the value itself.
        ties: features that must have the same factor, ``[n, copies]`` each.
        mixes: whether features are only moved and summed on the way, so that those of a head may also be mixed.
    """

    features: int
    edits: list[Edit] = field(default_factory=list)
    changed: list[fx.Node] = field(default_factory=list)
    ties: list[torch.Tensor] = field(default_factory=list)
    mixes: bool = True

    def tied(self, factors: torch.Tensor) -> torch.Tensor:
        """Factors ``[features]``, positive, with their geometric mean wherever several must be the same."""
        first = features.representatives(self.features, self.ties)
        total = torch.zeros(self.features, dtype=torch.float64).index_add_(0, first, factors.double().log())
        count = torch.zeros_like(total).index_add_(0, first, torch.ones_like(total))
        return (total[first] / count[first]).exp().to(factors.dtype)


def absorption(
    program: Program, value: fx.Node, readers: Collection[fx.Node], respects: frozenset[str]
) -> Absorption | str:
    """What takes factors for the features of a value whose readers make up for them, or why nothing does.

    Args:
        program: the program.
        value: ``[..., features]``.
        readers: nodes that may read the value; others than these, and the value is left as it is.
        respects: tags of nodes whose weights are left alone.
    """
    kind = program.type_of(value)
    if not isinstance(kind, TensorType) or not kind.shape or not isinstance(kind.shape[-1], int):
        return f"%{value.name} has no fixed number of features"
    search = _Search(program, respects, Absorption(kind.shape[-1]))
    reason = search.visit(value, features.of_features(kind.shape), readers)
    if reason is not None:
        return reason
    order = {node: place for place, node in enumerate(program.nodes)}
    search.found.changed.sort(key=order.__getitem__)
    return search.found


class _Search:
    """One walk backwards from a value."""

    def __init__(self, program: Program, respects: frozenset[str], found: Absorption) -> None:
        self.program, self.respects, self.found = program, respects, found

    def visit(self, node: fx.Node, layout: torch.Tensor, readers: Collection[fx.Node]) -> str | None:
        """Go on from a node whose elements get factors by this layout; the reason why that fails, if it does."""
        others = [user for user in node.users if user not in readers and not is_assertion(user)]
        if others:
            return f"%{node.name} is also read by %{others[0].name}"
        if node.op != "call_function":
            return f"%{node.name} is an input of the model" if node.op == "placeholder" else f"%{node.name} is a weight"
        if len(self.found.changed) >= _FARTHEST:
            return "it is too far from what could absorb the factors"
        self.found.changed.append(node)
        if gives_its_input(node):
            return self.visit(node.all_input_nodes[0], layout, {node})
        name = op_name(node)
        for names, step in _STEPS:
            if name in names:
                return step(self, node, layout)
        if isinstance(linear_target(self.program, node), LinearTarget | str):
            return self.linear(node, layout)
        return f"%{node.name} ({name}) stands between, which a factor does not pass"

    # -- operators that factors pass ----------------------------------------------------------------------------------

    def relu(self, node: fx.Node, layout: torch.Tensor) -> str | None:
        """``relu(f x) = f relu(x)`` for positive factors."""
        self.found.mixes = False
        return self.visit(node.all_input_nodes[0], layout, {node})

    def view(self, node: fx.Node, layout: torch.Tensor) -> str | None:
        """Views regroup the dimensions."""
        source = node.all_input_nodes[0]
        read = features.regrouped(layout, self.shape(node), self.shape(source))
        if read is None:
            return f"%{node.name} mixes features with sizes that vary"
        return self.visit(source, read, {node})

    def transpose(self, node: fx.Node, layout: torch.Tensor) -> str | None:
        """Transposes exchange dimensions."""
        given, rank = arguments_of(node), layout.dim()
        order = list(range(rank))
        if op_name(node) == "aten.permute":
            order = [place % rank for place in given["dims"]]
        else:
            one, other = (given["dim0"] % rank, given["dim1"] % rank) if "dim0" in given else (0, rank - 1)
            order[one], order[other] = other, one
        back = [order.index(place) for place in range(rank)]
        return self.visit(node.all_input_nodes[0], layout.permute(back), {node})

    def expand(self, node: fx.Node, layout: torch.Tensor) -> str | None:
        """Copies must have one factor."""
        source = node.all_input_nodes[0]
        return self.visit(source, features.unexpanded(layout, self.shape(source), self.found.ties), {node})

    def getitem(self, node: fx.Node, layout: torch.Tensor) -> str | None:
        """One part of a split; the others keep the factor 1."""
        split, part = node.all_input_nodes[0], node.args[1]
        assert isinstance(part, int)
        if op_name(split) not in _SPLITS:
            return f"%{split.name} ({op_name(split)}) stands between, which a factor does not pass"
        others = [user for user in split.users if op_name(user) != "py.getitem" or user.args[1] == part]
        if others != [node]:
            return f"%{split.name} is also read by %{next(user for user in others if user is not node).name}"
        source, place = split.all_input_nodes[0], arguments_of(split)["dim"] % layout.dim()
        whole = self.shape(source)[place]
        sizes = [value.shape[place] for value in split.meta["val"]]
        if not isinstance(whole, int):
            return f"%{split.name} cuts a size that varies"
        self.found.changed.append(split)
        return self.visit(source, features.placed(layout, place, int(sum(sizes[:part])), whole), {split})

    def slice(self, node: fx.Node, layout: torch.Tensor) -> str | None:
        """A slice of the features; nobody else may read the rest here, so one slice of all is enough."""
        given, source = arguments_of(node), node.all_input_nodes[0]
        place = given["dim"] % layout.dim()
        whole, start = self.shape(source)[place], given["start"] or 0
        if layout.shape[place] == 1 and self.shape(node)[place] != 1:
            return self.visit(source, layout, {node})
        if not isinstance(whole, int) or not isinstance(start, int) or given["step"] != 1:
            return f"%{node.name} slices a size that varies"
        begin = min(start % whole if start < 0 else start, whole)
        return self.visit(source, features.placed(layout, place, begin, whole), {node})

    def attention(self, node: fx.Node, layout: torch.Tensor) -> str | None:
        """Attention is linear in its values; query heads that share a value head share its factors."""
        value = arguments_of(node)["value"]
        shape = self.shape(value)
        if layout.dim() != 4 or layout.shape[0] != 1 or layout.shape[2] != 1 or not isinstance(shape[1], int):
            return f"%{node.name} is not over [batch, heads, length, width]"
        if layout.shape[1] > 1:
            layout = features.of_value_heads(layout, shape[1], self.found.ties)
        return self.visit(value, layout, {node})

    def product(self, node: fx.Node, layout: torch.Tensor) -> str | None:
        """A product of two computed values is linear in the right one, row by row."""
        left, right = node.args[0], node.args[1]
        if isinstance(right, fx.Node) and right.op == "get_attr":
            return self.linear(node, layout)
        if not isinstance(right, fx.Node) or right is left or layout.dim() < 2 or layout.shape[-2] != 1:
            return f"%{node.name} ({op_name(node)}) stands between, which a factor does not pass"
        return self.visit(right, features.unexpanded(layout, self.shape(right), self.found.ties), {node})

    def gate(self, node: fx.Node, layout: torch.Tensor) -> str | None:
        """``act(gate) * up`` is linear in ``up``."""
        self.found.mixes = False
        given = arguments_of(node)
        if given["up"] is given["gate"]:
            return f"%{node.name} reads one value twice"
        return self.visit(given["up"], layout, {node})

    def multiply(self, node: fx.Node, layout: torch.Tensor) -> str | None:
        """A product element by element: with a number, with a constant vector, or of two values."""
        self.found.mixes = False
        sides = [side for side in node.args[:2] if isinstance(side, fx.Node)]
        for side in sides:
            if side.op == "get_attr" and len(self.shape(side)) <= layout.dim():
                return self.edit(node, side, layout)
        if len(sides) == 2 and sides[0] is sides[1]:
            return f"%{node.name} squares its input"
        reasons = []
        for side in sides:
            kept = len(self.found.changed), len(self.found.edits), len(self.found.ties)
            reason = (
                self.visit(side, layout, {node})
                if self.shape(side) == self.shape(node)
                else f"%{side.name} is broadcast in %{node.name}"
            )
            if reason is None:
                return None
            reasons.append(reason)
            del self.found.changed[kept[0] :], self.found.edits[kept[1] :], self.found.ties[kept[2] :]
        return reasons[-1] if reasons else f"%{node.name} has no operand that could absorb a factor"

    # -- where the factors go ------------------------------------------------------------------------------------------

    def norm(self, node: fx.Node, layout: torch.Tensor) -> str | None:
        """The weight of a norm, and its bias."""
        given = arguments_of(node)
        if given["weight"] is None:
            return f"%{node.name} has no weight to fold factors into"
        self.found.mixes = False
        reason = self.edit(node, given["weight"], layout)
        bias = given.get("bias")
        return reason if reason is not None or bias is None else self.edit(node, bias, layout)

    def linear(self, node: fx.Node, layout: torch.Tensor) -> str | None:
        """The rows of a linear's weight, and its bias."""
        found = linear_target(self.program, node)
        if not isinstance(found, LinearTarget):
            return f"%{node.name} cannot absorb factors: {found or 'it is a product of two computed values'}"
        flat = layout.reshape(-1)
        if layout.shape[-1] != flat.numel():
            return f"%{node.name} has features in other dimensions than its last"
        reason = self.edit(node, found.weight, flat.unsqueeze(0 if found.transposed else 1))
        if reason is not None or found.bias is None:
            return reason
        return self.edit(node, found.bias, flat)

    def edit(self, node: fx.Node, weight: fx.Node, layout: torch.Tensor) -> str | None:
        """Note a weight to change, if nothing else reads it."""
        protected = tags_of(node) & self.respects
        if protected:
            return f"%{node.name} is tagged {', '.join(sorted(protected))}, which this pass leaves alone"
        if weight.op != "get_attr":
            return f"%{weight.name} is computed, not a constant"
        tensor = self.program.tensor(weight)
        others = [user for user in readers_of(self.program, weight) if user is not node]
        if others:
            return f"the weight {weight.target!r} is also read by %{others[0].name}"
        if not tensor.is_floating_point():
            return f"the weight {weight.target!r} is {tensor.dtype}"
        while layout.dim() > tensor.dim() and layout.shape[0] == 1:
            layout = layout.squeeze(0)
        whole = torch.broadcast_shapes(layout.shape, tensor.shape)
        if layout.dim() > tensor.dim() or whole != tensor.shape:
            return f"the weight {weight.target!r} is shared among features"
        self.found.edits.append(Edit(weight, layout))
        return None

    def shape(self, node: fx.Node) -> tuple[int | str, ...]:
        """Sizes of a node's value."""
        kind = self.program.type_of(node)
        assert isinstance(kind, TensorType)
        return kind.shape


_Step = Callable[[_Search, fx.Node, torch.Tensor], str | None]
_STEPS: tuple[tuple[frozenset[str], _Step], ...] = (
    (frozenset({"aten.relu"}), _Search.relu),
    (_VIEWS, _Search.view),
    (_TRANSPOSES, _Search.transpose),
    (frozenset({"aten.expand"}), _Search.expand),
    (frozenset({"py.getitem"}), _Search.getitem),
    (frozenset({"aten.slice.Tensor"}), _Search.slice),
    (_ATTENTION, _Search.attention),
    (_PRODUCTS, _Search.product),
    (frozenset({"graphwright.gated_activation"}), _Search.gate),
    (frozenset({"aten.mul.Tensor"}), _Search.multiply),
    (_NORMS, _Search.norm),
)
