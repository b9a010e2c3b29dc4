"""The hidden states that layers read through norms and add to: everything that meets them, or why it cannot be told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import fx

from graphwright.ir.arguments import arguments_of
from graphwright.ir.names import op_name
from graphwright.ir.program import Program
from graphwright.ir.provenance import tags_of
from graphwright.ir.types import TensorType
from graphwright.passes.quantization.equivalence.groups import gives_its_input, is_assertion, readers_of
from graphwright.passes.quantization.targets import LinearTarget, linear_target

_RMS = frozenset({"graphwright.rms_norm", "aten.rms_norm"})
_LAYER_NORM = "aten.layer_norm"
# Other rows of the features; not along the last dimension.
_ROWS = frozenset({"aten.slice.Tensor", "aten.select.int", "aten.index_select", "aten.unsqueeze", "aten.squeeze.dim"})
_VIEWS = frozenset({"aten.view", "aten.reshape", "aten._unsafe_view", "aten.expand"})
_SIZES = frozenset({"aten.sym_size.int"})


@dataclass
class HiddenStates:
    """What holds, makes and reads hidden states of one width.

    Attributes:
        width: features.
        centred: norms subtract the mean (layer norm), so hidden states may be made without one.
        embeddings: lookups that make hidden states.
        writers: linears that do.
        norms: read by ``readers``, directly or not.
        readers: linears and the norm behind them; ``None`` for hidden states without one.
        changed: nodes whose values change when the hidden states are rotated, norms and what follows them included.
    """

    width: int
    centred: bool = False
    embeddings: list[fx.Node] = field(default_factory=list)
    writers: list[LinearTarget] = field(default_factory=list)
    norms: list[fx.Node] = field(default_factory=list)
    readers: list[tuple[LinearTarget, fx.Node | None]] = field(default_factory=list)
    changed: list[fx.Node] = field(default_factory=list)


def hidden_states(
    program: Program, seed: fx.Node, respects: frozenset[str], chosen: Callable[[fx.Node], bool]
) -> HiddenStates | str:
    """All that belongs to the hidden states that a lookup makes, or what keeps them as they are.

    Args:
        program: the program.
        seed: an ``aten.embedding``.
        respects: tags of nodes that are left alone.
        chosen: nodes that may be changed.
    """
    kind = program.type_of(seed)
    assert isinstance(kind, TensorType)
    width = kind.shape[-1]
    if not isinstance(width, int):
        return f"%{seed.name} has a width that varies"
    walk = _Walk(program, HiddenStates(width), respects, chosen)
    reason = walk.run(seed)
    if reason is not None:
        return reason
    order = {node: place for place, node in enumerate(program.nodes)}
    found = walk.found
    found.changed.sort(key=order.__getitem__)
    kinds = {op_name(norm) == _LAYER_NORM for norm in found.norms}
    if len(kinds) > 1:
        return "some norms subtract the mean and others do not"
    found.centred = kinds == {True}
    bare = [target for target, norm in found.readers if norm is None]
    if found.centred and bare:
        return f"%{bare[0].node.name} reads hidden states before a layer norm, mean included"
    if not found.norms:
        return "nothing normalises them"
    return found


class _Walk:
    """Makers and readers of hidden states, followed until there are no more."""

    def __init__(
        self, program: Program, found: HiddenStates, respects: frozenset[str], chosen: Callable[[fx.Node], bool]
    ) -> None:
        self.program, self.found, self.respects, self.chosen = program, found, respects, chosen
        self.waiting: list[tuple[fx.Node, fx.Node | None]] = []
        self.norm_of: dict[fx.Node, fx.Node | None] = {}

    def run(self, seed: fx.Node) -> str | None:
        """Follow them; what stands in the way, if anything does."""
        reason = self._enter(seed, None)
        while self.waiting:
            node, norm = self.waiting.pop()
            reason = self._made(node) if norm is None else None
            for user in node.users if reason is None else ():
                reason = self._read(node, user, norm)
                if reason is not None:
                    break
            if reason is not None:
                return reason
        return reason

    def _enter(self, node: fx.Node, norm: fx.Node | None) -> str | None:
        if node in self.norm_of:
            return None if self.norm_of[node] is norm else f"%{node.name} mixes values before and after a norm"
        protected = tags_of(node) & self.respects
        if protected:
            return f"%{node.name} is tagged {', '.join(sorted(protected))}, which this pass leaves alone"
        if not self.chosen(node):
            return f"%{node.name} is not selected by where= / ignore="
        self.norm_of[node] = norm
        self.found.changed.append(node)
        self.waiting.append((node, norm))
        return None

    def _made(self, node: fx.Node) -> str | None:
        """Where hidden states come from."""
        name, given = op_name(node), arguments_of(node) if node.op == "call_function" else {}
        if name == "aten.embedding":
            table = given["weight"]
            if table.op != "get_attr":
                return f"the table of %{node.name} is computed"
            self.found.embeddings.append(node)
            return None
        if name == "aten.add.Tensor":
            return self._sum(node)
        if _keeps_features(node):
            return self._objection(node, node.all_input_nodes[0]) or self._enter(node.all_input_nodes[0], None)
        found = linear_target(self.program, node) if node.op == "call_function" else None
        if isinstance(found, LinearTarget):
            others = [user for user in readers_of(self.program, found.weight) if user is not node]
            if others:
                return f"the weight of %{node.name} is also read by %{others[0].name}"
            self.found.writers.append(found)
            return None
        if node.op == "placeholder":
            return f"they come from the input %{node.name}, which is not rotated"
        return (
            f"%{node.name} ({found if isinstance(found, str) else name}) makes them, and no weight of it can be rotated"
        )

    def _sum(self, node: fx.Node) -> str | None:
        left, right = node.args[0], node.args[1]
        if not isinstance(left, fx.Node) or not isinstance(right, fx.Node) or arguments_of(node)["alpha"] != 1:
            return f"%{node.name} adds a number to them"
        for side in (left, right):
            reason = self._objection(node, side) or self._enter(side, None)
            if reason is not None:
                return reason
        return None

    def _read(self, node: fx.Node, user: fx.Node, norm: fx.Node | None) -> str | None:
        """What reads hidden states, or what a norm has made of them."""
        name = op_name(user)
        if is_assertion(user) or name in _SIZES:
            return None
        if user.op == "output":
            return f"%{node.name} leaves the model as it is"
        found = linear_target(self.program, user)
        if isinstance(found, LinearTarget):
            return self._reader(found, node, norm)
        if name == "aten.add.Tensor" and norm is None:
            return self._enter(user, None)
        if (name in _RMS or name == _LAYER_NORM) and norm is None:
            return self._norm(user, node)
        if _keeps_features(user):
            return self._objection(user, node) or self._enter(user, norm)
        if norm is not None and name == "aten.add.Tensor":
            return f"what %{norm.name} gives is added to in %{user.name}, and its weight stands between (post-norm)"
        fused = " (FuseRMSNorm and FuseLayerNorm turn norms into one operator)" if "pow" in name else ""
        return f"%{user.name} ({found if isinstance(found, str) else name}) reads them{fused}"

    def _norm(self, user: fx.Node, node: fx.Node) -> str | None:
        given = arguments_of(user)
        if "normalized_shape" in given and list(given["normalized_shape"]) != [self.found.width]:
            return f"%{user.name} is over more than the features"
        for key in ("weight", "bias"):
            held = given.get(key)
            if held is None:
                continue
            if held.op != "get_attr":
                return f"the {key} of %{user.name} is computed"
            others = [reader for reader in readers_of(self.program, held) if reader is not user]
            if others:
                return f"the {key} of %{user.name} is also read by %{others[0].name}"
        if user not in self.found.norms:
            self.found.norms.append(user)
        return self._enter(user, user)

    def _reader(self, found: LinearTarget, node: fx.Node, norm: fx.Node | None) -> str | None:
        user = found.node
        protected = tags_of(user) & self.respects
        if protected:
            return f"%{user.name} is tagged {', '.join(sorted(protected))}, which this pass leaves alone"
        if found.x is not node:
            return f"%{user.name} reads them as a weight"
        others = [
            reader
            for reader in readers_of(self.program, found.weight)
            if reader is not user and op_name(reader) != "aten.embedding"
        ]
        if others:
            return f"the weight of %{user.name} is also read by %{others[0].name}"
        self.found.readers.append((found, norm))
        return None

    def _objection(self, node: fx.Node, side: fx.Node) -> str | None:
        """Whether the last dimension is not that of the features on both sides, or features are picked from it."""
        rank = 0
        for each in (node, side):
            kind = self.program.type_of(each)
            if not isinstance(kind, TensorType) or not kind.shape or kind.shape[-1] != self.found.width:
                return f"%{node.name} ({op_name(node)}) does not keep their {self.found.width} features together"
            rank = max(rank, len(kind.shape))
        place = arguments_of(node).get("dim") if op_name(node) in _ROWS else None
        if place is not None and place in (-1, rank - 1):
            return f"%{node.name} ({op_name(node)}) picks features"
        return None


def _keeps_features(node: fx.Node) -> bool:
    """Whether an operator moves rows of features only, or multiplies them all with one number."""
    if node.op != "call_function":
        return False
    name = op_name(node)
    return (
        gives_its_input(node)
        or name in _ROWS | _VIEWS
        or (name == "aten.mul.Tensor" and len(node.all_input_nodes) == 1)
    )
