"""Computing ahead of time what no input influences."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import fx, nn

from graphwright.ir.errors import InputError
from graphwright.ir.pattern import Refusal
from graphwright.ir.program import Program
from graphwright.ir.provenance import path_of, tags_of
from graphwright.ir.rewriter import Rewriter
from graphwright.ir.types import ScalarType, TensorType
from graphwright.passes.base import Pass
from graphwright.passes.cleanup.effects import is_pure


@dataclass(frozen=True, kw_only=True)
class FoldConstants(Pass):
    """Replace expressions of weights and constants by their value, stored as a buffer.

    Before::

        %arange = aten.arange(4)
        %row = aten.unsqueeze(%arange, 0)
        %position = aten.add.Tensor(%offset, %row)
        %size = aten.sym_size.int(%x, 2)
        %flat = aten.reshape(%x, [-1, %size])

    After (``%row_folded`` is a buffer, ``x`` is 384 wide)::

        %position = aten.add.Tensor(%offset, %row_folded)
        %flat = aten.reshape(%x, [-1, 384])

    Values are computed once, in the program's own dtypes and with its own operators, so the program's results stay the
    same. Sizes that are known numbers are written into their users.

    Does not fire when

    - the expression depends on a trainable parameter (``requires_grad``): folding it would freeze that parameter. Set
      ``fold_parameters`` for a program that will not be trained any more;
    - the value is larger than what it frees by more than ``max_growth`` bytes, such as an expanded table; its operands
      are still folded;
    - an operator of the expression draws random numbers or has an effect;
    - the value is itself a result of the program: handing out a stored tensor would let callers write into it;
    - a node of the expression is tagged ``quantized`` or ``adapter``.

    Attributes:
        max_growth: bytes by which one folded value may exceed the weights that it frees.
        fold_parameters: also fold expressions of trainable parameters; the result is a constant.
    """

    name: ClassVar[str] = "fold-constants"
    respects: ClassVar[frozenset[str]] = frozenset({"adapter", "quantized"})

    max_growth: int = 1 << 20
    fold_parameters: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.max_growth, bool) or not isinstance(self.max_growth, int) or self.max_growth < 0:
            raise InputError(f"must be a number of bytes, not {self.max_growth!r}", where=f"{self.name}: max_growth")

    def run(self, program: Program) -> bool:
        """Find the constant expressions, choose which of their values to store, store them."""
        refusals: list[Refusal] = []
        cones = self._constants(program, self.selected(program), refusals)
        chosen = self._chosen(program, cones, refusals)
        folded = 0
        with program.edit() as rewriter:
            values: dict[fx.Node, Any] = {}
            for node in program.nodes:
                if node._erased or node not in chosen:
                    continue
                kind = program.type_of(node)
                if isinstance(kind, ScalarType):
                    folded += _inline(rewriter, node, int(kind.expression))
                else:
                    _store(rewriter, node, constant_value(program, node, values, _natively))
                    folded += 1
        program.notes["rewrites"] = program.notes.get("rewrites", 0) + folded
        program.notes["refusals"] = (*program.notes.get("refusals", ()), *refusals)
        return folded > 0

    def _constants(
        self, program: Program, selected: Callable[[fx.Node], bool], refusals: list[Refusal]
    ) -> dict[fx.Node, set[fx.Node]]:
        """The nodes that no input influences, each with everything it is computed from."""

        def objection(node: fx.Node, cone: set[fx.Node]) -> str | None:
            return self._objection(program, node, cone) if selected(node) else "not selected by where= / ignore="

        cones, refused = constant_cones(program, objection)
        refusals += [self._refusal(node, reason, cone) for node, reason, cone in refused]
        return cones

    def _objection(self, program: Program, node: fx.Node, cone: set[fx.Node]) -> str | None:
        protected = tags_of(node) & self.respects
        if protected:
            return f"it is tagged {', '.join(sorted(protected))}, which this pass leaves alone"
        if any(user.op == "output" for user in node.users):
            return "it is a result of the program, which must not hand out a stored tensor"
        trainable = [item for item in cone if item.op == "get_attr" and _is_trainable(program, item)]
        if trainable and not self.fold_parameters:
            return f"it depends on the trainable parameter {trainable[0].target!r}; fold_parameters=True folds it"
        return None

    def _chosen(self, program: Program, cones: dict[fx.Node, set[fx.Node]], refusals: list[Refusal]) -> set[fx.Node]:
        """The constants that something which stays reads; one too large to store stays itself."""
        chosen: set[fx.Node] = set()
        staying = {node for node in program.nodes if node not in cones}
        for node in reversed(program.nodes):
            if node not in cones or not any(user in staying for user in node.users):
                continue
            kind = program.type_of(node)
            if _is_known_size(program, node):
                chosen.add(node)
                continue
            reason = self._too_large(program, kind, cones[node])
            if reason is None:
                chosen.add(node)
            else:
                staying.add(node)
                refusals.append(self._refusal(node, reason, cones[node]))
        return chosen

    def _too_large(self, program: Program, kind: Any, cone: set[fx.Node]) -> str | None:
        size = bytes_of(kind)
        if size is None:
            return (
                "its size varies" if isinstance(kind, TensorType) else "it is several values; each is looked at alone"
            )
        weights = [item for item in cone if item.op == "get_attr" and all(user in cone for user in item.users)]
        freed = sum(bytes_of(program.type_of(item)) or 0 for item in weights)
        if size - freed > self.max_growth:
            return f"its value has {size} bytes and frees {freed}; max_growth is {self.max_growth}"
        return None

    def _refusal(self, node: fx.Node, reason: str, cone: set[fx.Node]) -> Refusal:
        return Refusal(self.name, node.name, path_of(node), reason, len(cone))


def constant_cones(
    program: Program, objection: Callable[[fx.Node, set[fx.Node]], str | None]
) -> tuple[dict[fx.Node, set[fx.Node]], list[tuple[fx.Node, str, set[fx.Node]]]]:
    """The nodes that weights and numbers alone determine.

    Args:
        program: where.
        objection: why a node must not be taken for one, given all it is computed from; ``None`` where it may. Sizes
            that are known numbers always may.

    Returns:
        each of them with everything it is computed from, itself too; and those that were objected to, with the reason.
    """
    cones: dict[fx.Node, set[fx.Node]] = {}
    refused: list[tuple[fx.Node, str, set[fx.Node]]] = []
    for node in program.nodes:
        if node.op != "call_function" or not is_pure(node):
            continue
        if _is_known_size(program, node):
            cones[node] = {node}
            continue
        sources = node.all_input_nodes
        if not all(source.op == "get_attr" or source in cones for source in sources):
            continue
        cone = {node}.union(*(cones.get(source, {source}) for source in sources))
        reason = objection(node, cone)
        if reason is None:
            cones[node] = cone
        else:
            refused.append((node, reason, cone))
    return cones, refused


def _is_trainable(program: Program, node: fx.Node) -> bool:
    tensor = program.tensor(node)
    return isinstance(tensor, nn.Parameter) and tensor.requires_grad


def _is_known_size(program: Program, node: fx.Node) -> bool:
    kind = program.type_of(node)
    return isinstance(kind, ScalarType) and kind.kind == "int" and kind.expression.lstrip("-").isdigit()


def bytes_of(kind: Any) -> int | None:
    """Bytes of a tensor; ``None`` when a size varies, or for anything else."""
    if not isinstance(kind, TensorType):
        return None
    sizes = [size for size in kind.shape if isinstance(size, int)]
    return math.prod(sizes) * kind.dtype.itemsize if len(sizes) == len(kind.shape) else None


def constant_value(
    program: Program,
    node: fx.Node,
    values: dict[fx.Node, Any],
    run: Callable[[fx.Node, Callable[[fx.Node], Any]], Any],
) -> torch.Tensor:
    """The value of a constant node.

    Args:
        program: that has the weights.
        node: see :func:`constant_cones`.
        values: of other nodes, which are not computed again; new ones are entered.
        run: gives the value of a call from those of its operands.

    Returns:
        a contiguous tensor of its own.
    """

    def value_of(source: fx.Node) -> Any:
        if source.op == "get_attr":
            return program.tensor(source)
        if source not in values:
            kind = program.type_of(source)
            if isinstance(kind, ScalarType) and kind.kind == "int":
                values[source] = int(kind.expression)
            else:
                values[source] = run(source, value_of)
        return values[source]

    with torch.no_grad():
        value: torch.Tensor = value_of(node)
        # A copy: the value may be a view of a weight.
        return value.detach().clone(memory_format=torch.contiguous_format)


def _natively(node: fx.Node, value_of: Callable[[fx.Node], Any]) -> Any:
    """As the program would."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), value_of)
    return cast(Callable[..., Any], node.target)(*args, **kwargs)


def _store(rewriter: Rewriter, node: fx.Node, value: torch.Tensor) -> None:
    path = path_of(node)
    name = f"{path}.{node.name}_folded" if path else f"{node.name}_folded"
    rewriter.replace(node, rewriter.weight(name, value, like=node))


def _inline(rewriter: Rewriter, node: fx.Node, value: int) -> int:
    """Write a known size into the users of a node; returns how many took it."""
    count = 0
    for user in list(node.users):
        if user.op == "output":
            continue
        args, kwargs = fx.node.map_arg((user.args, user.kwargs), lambda item: value if item is node else item)
        rewriter.set_arguments(user, *args, **kwargs)
        count += 1
    return count
