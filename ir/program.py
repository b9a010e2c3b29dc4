"""``Program``: what a model is, for every pass and every backend."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from graphwright.ir.conditions import holds
from graphwright.ir.copying import copy_graph
from graphwright.ir.errors import InputError, ProgramError
from graphwright.ir.names import check_weight_name
from graphwright.ir.signature import Signature
from graphwright.ir.types import DECLARED, VAL, Dim, SymbolTable, TensorType, ValueType

if TYPE_CHECKING:
    from graphwright.ir.checkpointing import Checkpointed
    from graphwright.ir.rewriter import Rewriter


@dataclass(frozen=True)
class JournalEntry:
    """What one pass did.

    Attributes:
        pass_name: kebab-case name of the pass.
        options: its options as JSON values.
        changed: whether it changed the program.
        details: what it says of itself, as JSON values (counts, errors, seconds).
    """

    pass_name: str
    options: Mapping[str, Any]
    changed: bool
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Snapshot:
    """A state a program can return to: a copy of its graph and references to its tensors."""

    graph: fx.Graph
    tensors: Mapping[str, torch.Tensor]
    versions: Mapping[str, int]
    aliases: Mapping[str, str]
    journal: tuple[JournalEntry, ...]
    records: Mapping[str, Any] = field(default_factory=dict)
    symbols: SymbolTable | None = None
    kept: Mapping[str, Any] = field(default_factory=dict)
    signature: Signature | None = None
    modules: tuple[str, ...] = ()


class Program(nn.Module):
    """A model as a graph of ATen and dialect operators over named weights.

    It is called like the model it came from and returns the same output type; it is an ``nn.Module`` whose
    parameters, buffers and ``state_dict`` carry the original's names, so it trains and checkpoints like the original.

    Weights are shared with the model that was traced, not copied, until a pass replaces them; passes never write into
    a tensor. Use :meth:`clone` with ``copy_weights=True`` before training if the original must stay as it was.

    Attributes:
        body: the graph module: flat placeholders, ``get_attr`` weights, calls, one output.
        signature: how calls map to the graph's inputs and outputs.
        symbols: named dimensions and the types built on them.
        title: the model's class name, for messages.
        journal: what passes did, in order.
        aliases: further names of tied weights: alias name -> name in the graph.
        records: what passes leave for later ones to know, as JSON values, by the name of a family of passes; saved.
        kept: what passes keep in memory for later ones, such as replaced tensors, by the name of a family
            of passes; shared by copies, not saved. A value is put in anew, never changed.
        replacements: since the last pass began, name of a replaced node -> name of the node that stands for it.
        notes: what the running pass wants its report entry to say.
        origin: what the frontend that made the program knows of the model besides its graph; not saved.
    """

    def __init__(
        self,
        body: fx.GraphModule,
        signature: Signature,
        symbols: SymbolTable,
        *,
        title: str = "program",
        aliases: Mapping[str, str] | None = None,
        journal: tuple[JournalEntry, ...] = (),
        records: Mapping[str, Any] | None = None,
        kept: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.body = body
        self.signature = signature
        self.symbols = symbols
        self.title = title
        self.journal: list[JournalEntry] = list(journal)
        self.aliases: dict[str, str] = dict(aliases or {})
        self.records: dict[str, Any] = copy.deepcopy(dict(records or {}))
        self.kept: dict[str, Any] = dict(kept or {})
        self.replacements: dict[str, str] = {}
        self.notes: dict[str, Any] = {}
        self.origin: Any = None
        self.training = False
        self._checkpointed: Checkpointed | None = None

    # -- the graph ---------------------------------------------------------------------------------------------------

    @property
    def graph(self) -> fx.Graph:
        """The underlying FX graph. Change it through :meth:`edit`."""
        return self.body.graph

    @property
    def nodes(self) -> list[fx.Node]:
        """Every node in execution order."""
        return list(self.body.graph.nodes)

    @property
    def dims(self) -> Mapping[str, Dim]:
        """The named dimensions."""
        return self.symbols.dims

    @property
    def inputs(self) -> list[fx.Node]:
        """The placeholders in order."""
        return [node for node in self.body.graph.nodes if node.op == "placeholder"]

    @property
    def output(self) -> fx.Node:
        """The output node; its one argument is the flat tuple of results."""
        node: fx.Node = self.body.graph.output_node()
        return node

    @property
    def results(self) -> list[Any]:
        """What the program returns, flat and in order: nodes and constants."""
        items: Any = self.output.args[0]
        return list(items)

    def node(self, name: str) -> fx.Node:
        """The node of this name.

        Raises:
            ProgramError: there is none.
        """
        for node in self.nodes:
            if node.name == name:
                return node
        raise ProgramError(f"no node is named {name!r}")

    def type_of(self, node: fx.Node) -> ValueType | None:
        """The type of a node's value; where types were not inferred the one that its text declares."""
        found: ValueType | None = self.symbols.type_of_value(node.meta.get(VAL))
        return node.meta.get(DECLARED) if found is None else found

    def edit(self) -> Rewriter:
        """A context manager in which the graph may be rewritten; everything is undone when it raises."""
        from graphwright.ir.rewriter import Rewriter

        return Rewriter(self)

    def infer_types(self) -> None:
        """Compute the type of every node anew from the inputs' types.

        Raises:
            TypeMismatch: an operator does not accept its operands.
        """
        for node in self.body.graph.nodes:
            self.symbols.infer(node, self.tensor)

    # -- weights -----------------------------------------------------------------------------------------------------

    def tensor(self, which: str | fx.Node) -> torch.Tensor:
        """The weight of this (original or tied) name, or behind a ``get_attr`` node.

        Raises:
            ProgramError: there is no such weight.
        """
        name = str(which.target) if isinstance(which, fx.Node) else which
        if isinstance(which, fx.Node) and which.op != "get_attr":
            raise ProgramError("the node is not a weight", where=f"%{which.name}")
        name = self.aliases.get(name, name)
        owner, _, leaf = name.rpartition(".")
        module: Any = self.body
        for part in filter(None, owner.split(".")):
            module = getattr(module, part, None)
        value = getattr(module, leaf, None)
        if not isinstance(value, torch.Tensor):
            raise ProgramError(f"the program has no weight named {name!r}")
        return value

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every weight by name; tied weights once."""
        return {**dict(self.body.named_parameters()), **dict(self.body.named_buffers())}

    def require_values(self) -> None:
        """Check that every weight has values.

        Raises:
            ProgramError: there are some that have none: parsed without tensors, or let go of when they were packed.
        """
        bare = [name for name, tensor in self.tensors().items() if tensor.is_meta]
        if bare:
            raise ProgramError(
                f"{len(bare)} weights have no values, such as {bare[0]!r}",
                hint="they were let go of (CpuBackend(keep_weights=False)), or the program was parsed without tensors",
            )

    def set_tensor(self, name: str, tensor: torch.Tensor) -> None:
        """Bind a name to a tensor: a parameter when it is an ``nn.Parameter``, else a buffer. Used by the rewriter.

        Raises:
            ProgramError: no weight can have this name.
        """
        check_weight_name(name)
        owner, _, leaf = name.rpartition(".")
        module = self._module(owner, name)
        self._unbind(module, leaf)
        try:
            if isinstance(tensor, nn.Parameter):
                module.register_parameter(leaf, tensor)
            else:
                module.register_buffer(leaf, tensor)
        except KeyError as error:  # a module's, or one that torch.nn.Module keeps for itself
            raise ProgramError(f"the name {name!r} is taken: {error.args[0]}") from error

    def _module(self, path: str, name: str) -> nn.Module:
        """The module in which a weight of this name lies, made where it is missing."""
        module: nn.Module = self.body
        for part in filter(None, path.split(".")):
            child = module._modules.get(part)
            if child is None and isinstance(getattr(module, part, None), torch.Tensor):
                raise ProgramError(
                    f"the name {name!r} lies inside a weight", hint=f"{part!r} is a tensor, not a module"
                )
            if child is None:
                child = nn.Module()
                module.add_module(part, child)
            module = child
        return module

    def bind_tensors(self, tensors: Mapping[str, torch.Tensor], modules: Iterable[str] = ()) -> None:
        """Bind exactly these tensors. Parameters keep this order, on which optimizers rely.

        Where modules are given, in their order, buffers keep theirs too: parameters alone do not say in which order
        modules that hold buffers only lie among the others.
        """
        present = self.tensors()
        if list(present) == list(tensors) and all(present[name] is tensor for name, tensor in tensors.items()):
            return
        for module in self.body.modules():
            for leaf in [*module._parameters, *module._buffers]:
                self._unbind(module, leaf)
        self._prune_empty_modules(self.body)
        for path in modules:
            self._module(path, path)
        for name, tensor in tensors.items():
            self.set_tensor(name, tensor)

    def drop_unused_tensors(self) -> list[str]:
        """Unbind every weight no ``get_attr`` node reads, and free it; returns the names."""
        used = {str(node.target) for node in self.body.graph.nodes if node.op == "get_attr"}
        gone = [name for name in self.tensors() if name not in used]
        for name in gone:
            owner, _, leaf = name.rpartition(".")
            self._unbind(self.body.get_submodule(owner), leaf)
        for alias, target in list(self.aliases.items()):
            if target in gone:
                del self.aliases[alias]
        if gone:
            self._prune_empty_modules(self.body)
        return gone

    @staticmethod
    def _unbind(module: nn.Module, leaf: str) -> None:
        module._parameters.pop(leaf, None)
        module._buffers.pop(leaf, None)
        module.__dict__.pop(leaf, None)

    def _prune_empty_modules(self, module: nn.Module) -> bool:
        for name, child in list(module._modules.items()):
            if child is not None and self._prune_empty_modules(child):
                del module._modules[name]
        return not (module._parameters or module._buffers or module._modules)

    # -- nn.Module with the original's names --------------------------------------------------------------------------

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Trainable weights under their original names."""
        return self.body.named_parameters(prefix, recurse, remove_duplicate)

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Constant tensors under their original names."""
        return self.body.named_buffers(prefix, recurse, remove_duplicate)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Weights under their original names, tied ones under each of theirs."""
        state = self.body.state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", "")
        for alias, name in self.aliases.items():
            if prefix + name in state:
                state[prefix + alias] = state[prefix + name]
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights saved under the original names."""
        own = {name: value for name, value in state_dict.items() if name not in self.aliases}
        for alias, name in self.aliases.items():  # a tied weight may have been saved under any of its names
            if alias in state_dict and name not in own:
                own[name] = state_dict[alias]
        return self.body.load_state_dict(own, strict=strict, assign=assign)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program with the original's arguments.

        Raises:
            InputError: an argument is missing, of the wrong dtype, or of a size the program does not take.
        """
        flat = self.signature.flatten(args, kwargs)
        self.check_inputs(flat)
        return self.signature.unflatten(self.run_graph(*flat))

    def run_graph(self, *inputs: torch.Tensor) -> Any:
        """Run the graph on flat inputs; with gradients, as :func:`graphwright.checkpoint_blocks` has it."""
        from graphwright.ir.checkpointing import Checkpointed, is_checkpointed

        if not (torch.is_grad_enabled() and is_checkpointed(self)):
            return self.body(*inputs)
        if self._checkpointed is None:
            self._checkpointed = Checkpointed()
        return self._checkpointed(self, inputs)

    def check_inputs(self, flat: list[torch.Tensor]) -> None:
        """Check the dtype and sizes of flat inputs against the graph.

        Raises:
            InputError: naming the input, what it is and what it must be.
        """
        sizes: dict[str, tuple[int, str]] = {}
        for node, value in zip(self.inputs, flat, strict=True):
            kind = self.type_of(node)
            if not isinstance(kind, TensorType):
                continue
            where = f"input {node.target!r}"
            if value.dtype != kind.dtype:
                raise InputError(f"has dtype {value.dtype}, the program takes {kind.dtype}", where=where)
            if value.dim() != len(kind.shape):
                raise InputError(f"has shape {list(value.shape)}, the program takes {kind}", where=where)
            for axis, (size, expected) in enumerate(zip(value.shape, kind.shape, strict=True)):
                if isinstance(expected, int):
                    if size != expected:
                        raise InputError(f"has {size} in dimension {axis}, the program takes {kind}", where=where)
                    continue
                dim = self.dims[expected]
                if not dim.admits(size):
                    limit = f"{dim.min}..{dim.max if dim.max is not None else ''}"
                    raise InputError(f"has {size} for {expected!r}, the program takes {limit}", where=where)
                first, at = sizes.setdefault(expected, (size, str(node.target)))
                if first != size:
                    raise InputError(f"has {size} for {expected!r}, but input {at!r} has {first}", where=where)
        self._check_conditions({name: size for name, (size, _) in sizes.items()})

    def _check_conditions(self, sizes: Mapping[str, int]) -> None:
        for condition in self.symbols.conditions:
            if not holds(condition, sizes):
                given = ", ".join(f"{name} = {size}" for name, size in sizes.items())
                raise InputError(
                    f"the model was traced on a path for {condition}, and this call has {given}",
                    hint="trace the model again with example inputs of these sizes",
                )

    # -- copies and states ---------------------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """The present state, cheap: the graph is copied, tensors are referenced."""
        tensors = self.tensors()
        versions = {name: -1 if tensor.is_inference() else tensor._version for name, tensor in tensors.items()}
        records = copy.deepcopy(self.records)
        return Snapshot(
            copy_graph(self.body.graph),
            tensors,
            versions,
            dict(self.aliases),
            tuple(self.journal),
            records,
            self.symbols,
            dict(self.kept),
            self.signature,
            tuple(path for path, _ in self.body.named_modules()),
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Return to a state taken before. Tensors written into since cannot be brought back; see ``overwritten``."""
        self.bind_tensors(snapshot.tensors, snapshot.modules)
        self.aliases = dict(snapshot.aliases)
        self.journal = list(snapshot.journal)
        self.records = copy.deepcopy(dict(snapshot.records))
        self.symbols = snapshot.symbols or self.symbols
        self.kept = dict(snapshot.kept)
        self.signature = snapshot.signature or self.signature
        self.replacements = {}
        self.body.graph = copy_graph(snapshot.graph)

    @staticmethod
    def overwritten(snapshot: Snapshot) -> list[str]:
        """Names of the tensors that were written into since the snapshot was taken."""
        return [
            name
            for name, tensor in snapshot.tensors.items()
            if not tensor.is_inference() and tensor._version != snapshot.versions[name]
        ]

    def at(self, snapshot: Snapshot) -> Program:
        """A program in a state taken before, sharing its weights; this one stays as it is."""
        other = Program(
            fx.GraphModule(nn.Module(), fx.Graph()),
            self.signature,
            self.symbols,
            title=self.title,
            aliases=self.aliases,
            journal=tuple(self.journal),
            records=self.records,
            kept=self.kept,
        )
        other.restore(snapshot)
        other.origin = self.origin
        return other

    def clone(self, *, copy_weights: bool = False) -> Program:
        """A copy that can be rewritten apart from this one; it shares the weights unless told to copy them."""
        other = self.at(self.snapshot())
        if copy_weights:
            for name, tensor in other.tensors().items():
                copied = tensor.detach().clone().requires_grad_(tensor.requires_grad)
                is_parameter = isinstance(tensor, nn.Parameter)
                other.set_tensor(name, nn.Parameter(copied, tensor.requires_grad) if is_parameter else copied)
        return other

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``program.json`` and ``model.safetensors`` into a folder, atomically.

        Raises:
            SerializationError: the folder cannot be written; nothing half-written is left.
        """
        from graphwright.ir.serialization import save

        save(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Program:
        """Read a program written by :meth:`save`.

        Raises:
            SerializationError: a file is missing, truncated, or of another version.
        """
        from graphwright.ir.serialization import load

        return load(path)

    def __str__(self) -> str:
        from graphwright.ir.text import print_program

        return print_program(self)

    def __repr__(self) -> str:
        return f"<Program {self.title}: {len(self.body.graph.nodes)} nodes, {len(self.tensors())} weights>"

    def __deepcopy__(self, memo: dict[int, Any]) -> Program:
        return self.clone(copy_weights=True)

    def __reduce__(self) -> Any:
        raise ProgramError("a Program is not pickled", hint="use program.save(folder) and Program.load(folder)")


def require_program(value: Any) -> Program:
    """Check that a caller handed in a Program.

    Raises:
        InputError: it is something else.
    """
    if not isinstance(value, Program):
        raise InputError(
            f"expected a Program, got {type(value).__name__}", hint="make one with graphwright.trace(model, ...)"
        )
    return value
