"""The verifier: what every Program must satisfy, whoever changed it."""

from __future__ import annotations

import keyword
from collections.abc import Iterator

import torch
from torch import fx

from graphwright.ir.arguments import canonical_call, schema_of
from graphwright.ir.conditions import names_in
from graphwright.ir.copying import copy_graph
from graphwright.ir.errors import GraphwrightError, ProgramError
from graphwright.ir.memory import is_same_view, shared_memory
from graphwright.ir.names import target_name
from graphwright.ir.operands import misfit
from graphwright.ir.program import Program
from graphwright.ir.provenance import PATH, SOURCE, TAGS, describe
from graphwright.ir.text import Printer, lines_around
from graphwright.ir.types import VAL, SymbolTable, TensorType, ValueType

# Problems are listed together, but a broken graph can have thousands.
_MOST_PROBLEMS = 8

Problem = tuple[fx.Node | None, str]


def verify(program: Program, *, types: bool = True) -> None:
    """Check a program; all problems found are reported together, each with the IR around it.

    Structure: nodes in order, unique names, one output, inputs that fit the signature, known operators called as their
    schema says in the canonical spelling, weights that exist, are read, and have one name each. With ``types`` also,
    at the price of running every operator on fake tensors: every recorded type is the one computed from the inputs',
    and no two weights overlap in memory, as two views of one tensor do (such a program computes what it should, but
    the two come apart when it is saved).

    Raises:
        ProgramError: the program is malformed.
    """
    problems = [*_structure(program), *_weights(program)]
    if not problems and types:
        problems = [*_types(program), *_overlaps(program)]
    if problems:
        raise _error(program, problems)


def _error(program: Program, problems: list[Problem]) -> ProgramError:
    shown = problems[:_MOST_PROBLEMS]
    context: list[str] = []
    for index, (node, text) in enumerate(shown):
        if index > 0:
            context.append(f"also: {text}" if node is None else f"also: {text} (at {describe(node)})")
        if node is not None and node in set(program.nodes):
            context += [f"  {line}" for line in lines_around(program, node, radius=2 if index == 0 else 0)]
    if len(problems) > len(shown):
        context.append(f"and {len(problems) - len(shown)} more")
    node, first = shown[0]
    return ProgramError(
        f"the program is malformed: {first}",
        where=None if node is None else describe(node),
        context=context,
        hint="change programs only inside program.edit()",
    )


# -- structure ---------------------------------------------------------------------------------------------------------


def _structure(program: Program) -> Iterator[Problem]:
    nodes = program.nodes
    known = set(nodes)
    seen: set[fx.Node] = set()
    names: set[str] = set()
    for node in nodes:
        yield from _name(node, names)
        names.add(node.name)
        for source in node.all_input_nodes:
            if source not in known:
                yield node, f"it reads %{source.name}, which is not in the graph"
            elif source not in seen:
                yield node, f"it reads %{source.name}, which is not computed before it"
            if node not in source.users:
                yield node, f"%{source.name} does not know it as a user"
        yield from ((node, f"its user %{user.name} is not in the graph") for user in node.users if user not in known)
        seen.add(node)
        yield from _notes(node)
        if node.op == "call_function":
            yield from _call(node)
        elif node.op not in ("placeholder", "get_attr", "output"):
            yield node, f"a {node.op} node has no place in a Program"
    yield from _ends(program, nodes)


def _name(node: fx.Node, names: set[str]) -> Iterator[Problem]:
    if node.name in names:
        yield node, f"two nodes are named {node.name!r}"
    if not node.name.isidentifier() or keyword.iskeyword(node.name):
        yield node, f"{node.name!r} cannot be a name"


def _notes(node: fx.Node) -> Iterator[Problem]:
    if not isinstance(node.meta.get(TAGS, frozenset()), frozenset):
        yield node, "its tags are not a frozenset"
    for key in (PATH, SOURCE):
        if not isinstance(node.meta.get(key, ""), str):
            yield node, f"its {key} is not a string"
    if node.op != "output" and VAL not in node.meta:
        yield node, "it has no type"


def _ends(program: Program, nodes: list[fx.Node]) -> Iterator[Problem]:
    inputs = tuple(str(node.target) for node in nodes if node.op == "placeholder")
    if inputs != program.signature.names:
        yield None, f"the inputs are {inputs}, the signature has {program.signature.names}"
    varying = set().union(*(_dimensions(program.type_of(node)) for node in nodes if node.op == "placeholder"))
    for condition in program.symbols.conditions:
        yield from (
            (None, f"the condition {condition!r} speaks of {name!r}, which no input has")
            for name in sorted(names_in(condition) - varying)
        )
    outputs = [node for node in nodes if node.op == "output"]
    if len(outputs) != 1 or nodes[-1] is not outputs[0]:
        yield None, "there must be exactly one output, at the end"
        return
    output = outputs[0]
    results = output.args[0] if len(output.args) == 1 else None
    wanted = program.signature.out_spec.num_leaves
    if not isinstance(results, tuple):
        yield output, "the output must return one flat tuple"
        return
    if len(results) != wanted:
        yield output, f"the signature has {wanted} outputs, not {len(results)}"
    for item in results:
        value = item.meta.get(VAL) if isinstance(item, fx.Node) else item
        if isinstance(value, tuple | list | dict):
            yield output, f"the output {item} is not a single value"


def _dimensions(kind: ValueType | None) -> set[str]:
    return {size for size in kind.shape if isinstance(size, str)} if isinstance(kind, TensorType) else set()


def _call(node: fx.Node) -> Iterator[Problem]:
    try:
        target_name(node.target)
    except ProgramError as error:
        yield node, error.what
        return
    schema = schema_of(node)
    if schema is None:
        return
    if schema.is_mutable:
        yield node, f"{schema.name} writes into its operands"
    positional = [item for item in schema.arguments if not item.kwarg_only]
    if len(node.args) > len(positional):
        yield node, f"{schema.name} takes {len(positional)} positional operands, here are {len(node.args)}"
        return
    places = {item.name: item for item in schema.arguments}
    given = {item.name: value for item, value in zip(positional, node.args, strict=False)}
    for name, value in node.kwargs.items():
        if name not in places:
            yield node, f"{schema.name} has no operand {name!r}"
        elif name in given:
            yield node, f"the operand {name!r} is given twice"
        else:
            given[name] = value
    for name, place in places.items():
        if name not in given and not place.has_default_value():
            yield node, f"{schema.name} needs the operand {name!r}"
        elif name in given and (reason := misfit(given[name], place)) is not None:
            yield node, reason
    if canonical_call(node.target, node.args, dict(node.kwargs)) != (node.args, dict(node.kwargs)):
        yield (
            node,
            "it is not in the canonical spelling: operands that equal their default are left out",
        )


# -- weights -----------------------------------------------------------------------------------------------------------


def _weights(program: Program) -> Iterator[Problem]:
    tensors: dict[str, torch.Tensor] = {
        **dict(program.body.named_parameters(remove_duplicate=False)),
        **dict(program.body.named_buffers(remove_duplicate=False)),
    }
    read: set[str] = set()
    for node in program.nodes:
        if node.op != "get_attr":
            continue
        name = str(node.target)
        if name not in tensors:
            yield node, f"there is no weight {name!r}"
        elif name in read:
            yield node, f"the weight {name!r} has two get_attr nodes"
        elif program.type_of(node) != TensorType(tensors[name].dtype, tuple(tensors[name].shape)):
            kind = TensorType(tensors[name].dtype, tuple(tensors[name].shape))
            yield node, f"its recorded type is {program.type_of(node)}, the weight {name!r} is {kind}"
        read.add(name)
    yield from ((None, f"nothing reads the weight {name!r}") for name in tensors if name not in read)
    for alias, name in program.aliases.items():
        if name not in tensors:
            yield None, f"the tied name {alias!r} stands for {name!r}, which does not exist"
        if alias in tensors:
            yield None, f"the tied name {alias!r} is also the name of a weight"
    owners: dict[int, str] = {}
    one = [(owners.setdefault(id(tensor), name), name) for name, tensor in tensors.items()]
    for first, second in {**dict.fromkeys(one), **dict.fromkeys(shared_memory(tensors))}:
        if first != second and is_same_view(tensors[first], tensors[second]):
            yield None, f"the weights {first!r} and {second!r} are one tensor; keep one and make the other an alias"


def _overlaps(program: Program) -> Iterator[Problem]:
    for first, second in shared_memory(program.tensors()):
        yield None, f"the weights {first!r} and {second!r} are views that share memory; clone one of them"


# -- types -------------------------------------------------------------------------------------------------------------


def _types(program: Program) -> Iterator[Problem]:
    """Infer every type from those of the inputs, on a copy and in a fake mode of its own, and compare."""
    fresh = SymbolTable(program.dims, program.symbols.conditions)
    inferred = Printer(program, types=True, provenance=False)
    recorded = Printer(program, types=True, provenance=False)
    failed: set[str] = set()
    for node, copied in zip(program.nodes, copy_graph(program.graph).nodes, strict=True):
        if node.op == "output" or any(source.name in failed for source in node.all_input_nodes):
            failed.add(node.name)
            continue
        kind = program.type_of(node)
        try:
            if node.op == "placeholder":
                if not isinstance(kind, TensorType):
                    yield node, f"an input must be a tensor, its recorded type is {kind}"
                    failed.add(node.name)
                    continue
                copied.meta[VAL] = fresh.fake(kind)
            else:
                fresh.infer(copied, program.tensor)
        except GraphwrightError as error:
            failed.add(node.name)
            yield node, error.what
            continue
        found = fresh.type_of_value(copied.meta.get(VAL))
        if recorded.numbered(kind) != inferred.numbered(found):
            failed.add(node.name)
            yield node, f"its recorded type is {kind}, it computes {found}"
