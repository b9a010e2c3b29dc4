"""The structural verifier: what every Program must satisfy, whoever changed it."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from graphwright.ir.arguments import canonical_call, schema_of
from graphwright.ir.errors import GraphwrightError, ProgramError
from graphwright.ir.names import target_name
from graphwright.ir.program import Program
from graphwright.ir.provenance import TAGS, describe
from graphwright.ir.types import VAL

# Problems are listed together, but a broken graph can have thousands.
_MOST_PROBLEMS = 8
_CONTEXT_NODES = 2


def verify(program: Program, *, types: bool = True) -> None:
    """Check a program; all problems found are reported together, each with the IR around it.

    Structure: nodes in order, unique names, one output, inputs that fit the signature, known operators called as their
    schema
    says in the canonical spelling, weights that exist, are read, and have one name each. With ``types``, every
    recorded type is
    computed anew and compared.

    Raises:
        ProgramError: the program is malformed.
    """
    problems = list(_structure(program))
    if not problems:
        problems = list(_weights(program))
    if not problems and types:
        problems = list(_types(program))
    if not problems:
        return
    shown = problems[:_MOST_PROBLEMS]
    more = f" (and {len(problems) - len(shown)} more)" if len(problems) > len(shown) else ""
    node, first = shown[0]
    context = [line for item, _ in shown[:1] if item is not None for line in _surroundings(program, item)]
    others = [f"also {text} ({describe(item)})" if item is not None else f"also {text}" for item, text in shown[1:]]
    raise ProgramError(
        f"the program is malformed: {first}{more}",
        where=describe(node) if node is not None else None,
        context=[*context, *others],
        hint="change programs only inside program.edit()",
    )


Problem = tuple[fx.Node | None, str]


def _structure(program: Program) -> Iterator[Problem]:
    seen: set[fx.Node] = set()
    names: set[str] = set()
    nodes = program.nodes
    outputs = [node for node in nodes if node.op == "output"]
    if len(outputs) != 1 or not nodes or nodes[-1] is not outputs[0]:
        yield None, "there must be exactly one output, at the end"
        return
    for node in nodes:
        if node.name in names:
            yield node, f"two nodes are named {node.name!r}"
        names.add(node.name)
        for source in node.all_input_nodes:
            if source not in seen:
                yield node, f"it reads %{source.name}, which is not computed before it"
        seen.add(node)
        if node.op == "call_function":
            yield from _call(node)
        elif node.op not in ("placeholder", "get_attr", "output"):
            yield node, f"a {node.op} node has no place in a Program"
        if not isinstance(node.meta.get(TAGS, frozenset()), frozenset):
            yield node, "its tags are not a frozenset"
        if node.op != "output" and VAL not in node.meta:
            yield node, "it has no type"
    if not isinstance(outputs[0].args[0], tuple | list):
        yield outputs[0], "the output must be a flat tuple"
    elif len(outputs[0].args[0]) != program.signature.out_spec.num_leaves:
        yield (
            outputs[0],
            f"the signature has {program.signature.out_spec.num_leaves} outputs, not {len(outputs[0].args[0])}",
        )
    inputs = tuple(str(node.target) for node in program.inputs)
    if inputs != program.signature.names:
        yield None, f"the inputs are {inputs}, the signature has {program.signature.names}"


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
    known = {item.name for item in schema.arguments}
    positional = [item for item in schema.arguments if not item.kwarg_only]
    if len(node.args) > len(positional):
        yield node, f"{schema.name} takes {len(positional)} positional operands, here are {len(node.args)}"
        return
    for name in node.kwargs:
        if name not in known:
            yield node, f"{schema.name} has no operand {name!r}"
    given = {item.name for item in positional[: len(node.args)]} | set(node.kwargs)
    for item in schema.arguments:
        if item.name not in given and not item.has_default_value():
            yield node, f"{schema.name} needs the operand {item.name!r}"
    if canonical_call(node.target, node.args, dict(node.kwargs)) != (node.args, dict(node.kwargs)):
        yield node, "it is not in the canonical spelling"


def _weights(program: Program) -> Iterator[Problem]:
    tensors = program.tensors()
    read: set[str] = set()
    for node in program.nodes:
        if node.op != "get_attr":
            continue
        name = str(node.target)
        if name not in tensors:
            yield node, f"there is no weight {name!r}"
        elif name in read:
            yield node, f"the weight {name!r} has two get_attr nodes"
        read.add(name)
    for name in tensors:
        if name not in read:
            yield None, f"nothing reads the weight {name!r}"
    owner: dict[int, str] = {}
    for name, tensor in tensors.items():
        if owner.setdefault(id(tensor), name) != name:
            yield None, f"the weights {owner[id(tensor)]!r} and {name!r} are one tensor; tie them by an alias"
    for alias, name in program.aliases.items():
        if name not in tensors:
            yield None, f"the tied name {alias!r} stands for {name!r}, which does not exist"


def _types(program: Program) -> Iterator[Problem]:
    for node in program.nodes:
        if node.op not in ("get_attr", "call_function"):
            continue
        recorded, value = program.type_of(node), node.meta[VAL]
        try:
            found = program.symbols.type_of_value(program.symbols.infer(node, program.tensor))
        except GraphwrightError as error:
            yield node, error.what
            continue
        finally:
            node.meta[VAL] = value
        if found != recorded:
            yield node, f"its recorded type is {recorded}, it computes {found}"


def _surroundings(program: Program, node: fx.Node) -> list[str]:
    nodes = program.nodes
    place = nodes.index(node)
    lines = []
    for item in nodes[max(0, place - _CONTEXT_NODES) : place + _CONTEXT_NODES + 1]:
        mark = ">" if item is node else " "
        operands = f"({', '.join(map(str, item.args))})" if item.op == "call_function" else ""
        call = f"{item.target}{operands}" if operands else f"{item.op} {item.target}"
        lines.append(f"{mark} %{item.name} = {call} : {program.type_of(item)}")
    return lines
