"""The one way to change a program's graph: typed, all-or-nothing, with a record of what stands for what."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import fx

from graphwright.ir import provenance
from graphwright.ir.arguments import canonical_call
from graphwright.ir.errors import ProgramError, TypeMismatch
from graphwright.ir.names import resolve_target
from graphwright.ir.program import Program, Snapshot
from graphwright.ir.types import VAL, Dim, SymbolTable, TensorType


class Rewriter:
    """Edits a program inside a ``with`` block. If the block raises, the program is as it was before.

    Every node made is typed at once; a replacement must have the type of what it replaces. Nodes that lose their last
    user by an edit are removed with it, and weights nobody reads any more are freed at the end.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.changed = False
        self._before: Snapshot | None = None
        self._stale = False
        self._replacements: dict[str, str] = {}

    def __enter__(self) -> Rewriter:
        self._before = self.program.snapshot()
        self._replacements = dict(self.program.replacements)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._before is not None
        if error is None:
            try:
                self._commit()
                return
            except BaseException:
                self._roll_back()
                raise
        self._roll_back()

    def _roll_back(self) -> None:
        assert self._before is not None
        self.program.restore(self._before)
        self.program.replacements = self._replacements

    def _commit(self) -> None:
        if not self.changed:
            return
        try:
            self.program.graph.lint()
        except (RuntimeError, ValueError, TypeError) as error:
            raise ProgramError(f"the rewritten graph is not well formed: {error}") from error
        if self._stale:
            self.retype()
        self.program.drop_unused_tensors()
        self.program.body.recompile()

    # -- making nodes --------------------------------------------------------------------------------------------------

    def call(
        self,
        target: str | Any,
        /,
        *args: Any,
        like: fx.Node,
        name: str | None = None,
        tags: tuple[str, ...] = (),
        **kwargs: Any,
    ) -> fx.Node:
        """A new call node, placed right after the last of its operands (or before ``like`` when it has none).

        Args:
            target: an operator as written (``"aten.linear"``, ``"graphwright.rms_norm"``) or a call target.
            args: operands: nodes, numbers, lists of them.
            like: the node whose module path, source line and tags the new one inherits.
            name: wanted node name; the operator's by default.
            tags: further tags.
            kwargs: keyword operands.

        Raises:
            TypeMismatch: the operator does not accept these operands.
        """
        function = resolve_target(target) if isinstance(target, str) else target
        args, kwargs = canonical_call(function, args, kwargs)
        operands: list[fx.Node] = []
        fx.node.map_arg((args, kwargs), operands.append)
        graph = self.program.graph
        first = self._first_call()
        if not operands:
            place = graph.inserting_before(like)
        elif max(operands) < first:  # weights and inputs only: behind all of these
            place = graph.inserting_before(first)
        else:
            place = graph.inserting_after(max(operands))
        with place:
            node: fx.Node = graph.create_node("call_function", function, args, kwargs, name or _base_name(function))
        self._inherit(node, like, tags)
        try:
            self.program.symbols.infer(node, self.program.tensor)
        except TypeMismatch:
            graph.erase_node(node)
            raise
        self.changed = True
        return node

    def weight(self, name: str, tensor: torch.Tensor, *, like: fx.Node, tags: tuple[str, ...] = ()) -> fx.Node:
        """A ``get_attr`` node for a new weight: trainable if ``tensor`` is an ``nn.Parameter``, constant otherwise.

        The name is made unique by a suffix when it is taken by another tensor; the same tensor under the same name
        gives the node it already has.
        """
        program, graph = self.program, self.program.graph
        wanted, number = name, 1
        while (held := self._held(wanted)) is not None and held is not tensor:
            wanted, number = f"{name}_{number}", number + 1
        wanted = program.aliases.get(wanted, wanted)
        if held is not None:
            for node in program.nodes:
                if node.op == "get_attr" and node.target == wanted:
                    return node
        program.set_tensor(wanted, tensor)
        with graph.inserting_before(self._first_not_weight()):
            node = graph.create_node("get_attr", wanted, (), {}, wanted.replace(".", "_"))
        self._inherit(node, like, tags)
        program.symbols.infer(node, program.tensor)
        self.changed = True
        return node

    def _held(self, name: str) -> torch.Tensor | None:
        """The weight of a name; looked up, as listing all of them for each new one takes seconds in large models."""
        try:
            return self.program.tensor(name)
        except ProgramError:
            return None

    def rebind(self, weight: fx.Node, tensor: torch.Tensor, *, retyped: bool = False) -> None:
        """Give a weight other values under its name: what its readers compute changes.

        Args:
            weight: its ``get_attr`` node.
            tensor: of the same dtype and shape; never the old one written into, which the original model shares.
            retyped: the shape may differ; every type is computed anew, at the end or by :meth:`retype`.

        Raises:
            TypeMismatch: dtype or shape differ.
        """
        old = self.program.tensor(weight)
        self._stale = self._stale or (retyped and tensor.shape != old.shape)
        if tensor.dtype != old.dtype or (tensor.shape != old.shape and not retyped):
            raise TypeMismatch(
                f"the new values are {tensor.dtype}{list(tensor.shape)}, the weight {old.dtype}{list(old.shape)}",
                where=f"weight {weight.target!r}",
            )
        owner, _, leaf = str(weight.target).rpartition(".")
        module = self.program.body.get_submodule(owner)
        if leaf in module._parameters:  # in its place: optimizers rely on the order
            module._parameters[leaf] = torch.nn.Parameter(tensor, old.requires_grad)
        else:
            module._buffers[leaf] = tensor
        self.changed = True

    def freeze(self, weight: str) -> None:
        """Take a weight from training: it becomes a parameter without gradient over the same memory.

        The model that the program was traced from may share the parameter, which keeps its own setting.

        Raises:
            ProgramError: there is no such weight.
        """
        old = self.program.tensor(weight)
        if not isinstance(old, torch.nn.Parameter) or not old.requires_grad:
            return
        owner, _, leaf = self.program.aliases.get(weight, weight).rpartition(".")
        module = self.program.body.get_submodule(owner)
        module._parameters[leaf] = torch.nn.Parameter(old.detach(), requires_grad=False)
        self.changed = True

    def add_input(
        self, keyword: str, shape: Sequence[Any], dtype: torch.dtype, *, stand_in: torch.Tensor | float
    ) -> fx.Node:
        """One more input of the program, which callers give by keyword; behind all others in the graph.

        Args:
            keyword: what callers call it; the node's name is made of it.
            shape: sizes, or dimensions as other inputs' values have them.
            dtype: of its value.
            stand_in: the value with which the program computes what it did before, or a number to fill it with. It is
                what example inputs from before are completed with, see :mod:`graphwright.ir.completion`.

        Raises:
            InputError: the program has an argument of that name.
        """
        program, inputs = self.program, self.program.inputs
        signature = program.signature
        with program.graph.inserting_after(inputs[-1]):
            node = program.graph.placeholder("".join(c if c.isalnum() else "_" for c in keyword))
        node.target = node.name
        program.signature = signature.with_keyword(keyword, node.name)
        node.meta[VAL] = inputs[0].meta[VAL].new_empty(tuple(shape), dtype=dtype)
        program.kept["inputs"] = {**program.kept.get("inputs", {}), node.name: stand_in}
        self.changed = True
        return node

    # -- changing ------------------------------------------------------------------------------------------------------

    def limit(self, dim: str, most: int) -> None:
        """Let a dimension have no size above ``most``, from here on; every type is computed anew by :meth:`retype`.

        Raises:
            ProgramError: there is no such dimension, or nothing would be left of it.
        """
        table = self.program.symbols
        if dim not in table.dims:
            raise ProgramError(f"the program has no dimension {dim!r}")
        old = table.dims[dim]
        if old.max is not None and old.max <= most:
            return
        if most < old.min:
            raise ProgramError(f"the dimension {dim!r} would have no size left: {old.min}..{most}")
        self._resize(dataclasses.replace(old, max=most, hint=min(old.hint, most)))

    def lift(self, dim: str, most: int | None, hint: int) -> None:
        """Take a limit back that :meth:`limit` set; every type is computed anew by :meth:`retype`.

        Args:
            dim: its name.
            most: the limit before, ``None`` where there was none.
            hint: the size when the model was traced.

        Raises:
            ProgramError: there is no such dimension.
        """
        table = self.program.symbols
        if dim not in table.dims:
            raise ProgramError(f"the program has no dimension {dim!r}")
        self._resize(dataclasses.replace(table.dims[dim], max=most, hint=hint))

    def _resize(self, new: Dim) -> None:
        # The table may be that of other programs too, so it is another one, with types of its own.
        table = self.program.symbols
        kinds = {node: self.program.type_of(node) for node in self.program.inputs}
        self.program.symbols = SymbolTable({**table.dims, new.name: new}, table.conditions)
        for node, kind in kinds.items():
            if isinstance(kind, TensorType):
                node.meta[VAL] = self.program.symbols.fake(kind)
        self.changed = True

    def retype(self) -> None:
        """Compute every type anew, after values of other shapes were put in.

        Raises:
            TypeMismatch: an operator does not accept its operands.
        """
        self.program.infer_types()
        self._stale = False

    def replace(self, old: fx.Node, new: fx.Node, *, equivalent: bool = True, retyped: bool = False) -> None:
        """Let every user of ``old`` read ``new``, and remove ``old`` with whatever becomes dead by that.

        Args:
            old: the node to go.
            new: the node to stand for it; may be one that already exists.
            equivalent: record that ``new`` stands for ``old``, so that verification compares their values.
            retyped: dtype and shape may differ; every type is computed anew, at the end or by :meth:`retype`.

        Raises:
            TypeMismatch: dtype or shape differ.
        """
        if old is new:
            raise ProgramError("a node cannot replace itself", where=provenance.describe(old))
        before, after = self.program.type_of(old), self.program.type_of(new)
        if before != after and not retyped:
            raise TypeMismatch(
                f"the replacement is {after}, the replaced value {before}", where=provenance.describe(old)
            )
        late = [user for user in old.users if user < new and user is not new]
        if late:
            raise ProgramError(
                f"%{new.name} is computed after %{late[0].name}, which needs it", where=provenance.describe(old)
            )
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        if equivalent:
            self.program.replacements[old.name] = new.name
        self.changed = True
        self._stale = self._stale or before != after
        self._erase_dead(old)

    def redirect(
        self,
        old: fx.Node,
        new: fx.Node,
        *,
        besides: Collection[fx.Node],
        equivalent: bool = True,
        retyped: bool = False,
    ) -> None:
        """Let the users of ``old`` read ``new``, which is computed from it.

        Args:
            old: stays, with the users in ``besides``.
            new: the node to be read in its place.
            besides: the nodes between the two, and others that go on reading ``old``.
            equivalent: record that ``new`` stands for ``old``, so that verification compares their values.
            retyped: dtype and shape may differ; every type is computed anew, at the end or by :meth:`retype`.

        Raises:
            TypeMismatch: dtype or shape differ.
            ProgramError: a user is computed before ``new``.
        """
        before, after = self.program.type_of(old), self.program.type_of(new)
        if before != after and not retyped:
            raise TypeMismatch(f"the new value is {after}, the old one {before}", where=provenance.describe(old))
        users = [user for user in old.users if user not in besides and user is not new]
        late = [user for user in users if user < new]
        if late:
            raise ProgramError(
                f"%{new.name} is computed after %{late[0].name}, which needs it", where=provenance.describe(old)
            )
        for user in users:
            user.replace_input_with(old, new)
        if equivalent:
            self.program.replacements[old.name] = new.name
        self.changed = True
        self._stale = self._stale or before != after

    def erase(self, node: fx.Node) -> None:
        """Remove a node nobody uses, and whatever becomes dead by that.

        Raises:
            ProgramError: the node has users, or is an input or the output.
        """
        if node.users:
            raise ProgramError(f"%{node.name} still has users: {', '.join(user.name for user in node.users)}")
        if node.op in ("placeholder", "output"):
            raise ProgramError(f"the {node.op} cannot be removed", where=f"%{node.name}")
        self.changed = True
        self._erase_dead(node)

    def set_arguments(self, node: fx.Node, /, *args: Any, **kwargs: Any) -> None:
        """Give a node other operands; its type is computed anew and must stay.

        Raises:
            TypeMismatch: the type would change, or the operands are not accepted.
        """
        before, inputs = self.program.type_of(node), list(node.all_input_nodes)
        present = node.args, node.kwargs, node.meta[VAL]
        node.args, node.kwargs = canonical_call(node.target, args, kwargs)
        try:
            self.program.symbols.infer(node, self.program.tensor)
            after = self.program.type_of(node)
            if before != after:
                raise TypeMismatch(f"the node would become {after}, it is {before}", where=provenance.describe(node))
        except TypeMismatch:
            node.args, node.kwargs, node.meta[VAL] = present
            raise
        self.changed = True
        for source in inputs:
            if not source.users:
                self._erase_dead(source)

    def _erase_dead(self, node: fx.Node) -> None:
        stack = [node]
        while stack:
            dead = stack.pop()
            if dead.users or dead.op in ("placeholder", "output") or dead._erased:
                continue
            sources = list(dead.all_input_nodes)
            self.program.graph.erase_node(dead)
            stack.extend(sources)

    # -- places --------------------------------------------------------------------------------------------------------

    def _inherit(self, node: fx.Node, like: fx.Node, tags: tuple[str, ...]) -> None:
        for key in (provenance.PATH, provenance.SOURCE):
            if key in like.meta:
                node.meta[key] = like.meta[key]
        node.meta[provenance.TAGS] = provenance.tags_of(like) | frozenset(tags)

    def _first_call(self) -> fx.Node:
        return next(node for node in self.program.nodes if node.op in ("call_function", "output"))

    def _first_not_weight(self) -> fx.Node:
        return next(node for node in self.program.nodes if node.op != "get_attr")


def _base_name(function: Any) -> str:
    schema = getattr(function, "_schema", None)
    return str(schema.name.partition("::")[2] if schema is not None else function.__name__)
