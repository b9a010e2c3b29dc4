"""Whether two programs are the same, node names aside."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn

from graphwright.ir.literals import format_value
from graphwright.ir.names import op_name
from graphwright.ir.program import Program
from graphwright.ir.provenance import describe, path_of, source_of, tags_of
from graphwright.ir.text import Printer
from graphwright.ir.types import TensorType


def structurally_equal(
    first: Program, second: Program, *, names: bool = False, provenance: bool = False, values: bool = False
) -> bool:
    """Whether two programs have the same inputs, weights and operators in the same order, wired in the same way.

    Compared are dimensions (not the sizes they were traced with), conditions, signatures, aliases, weights by name,
    dtype, shape and kind, and every call by operator, operands and type. The journal, the title and the strides of
    weights are not.

    Args:
        first: one program.
        second: the other.
        names: node names must agree as well.
        provenance: module paths, tags and source lines must agree as well.
        values: weights must have the same bits as well.
    """
    return first_difference(first, second, names=names, provenance=provenance, values=values) is None


def first_difference(
    first: Program, second: Program, *, names: bool = False, provenance: bool = False, values: bool = False
) -> str | None:
    """The first thing in which two programs differ, in words; ``None`` when they are equal. See above."""
    found = [_header(first, second), _weights(first, second, values), _nodes(first, second, names, provenance)]
    return next((text for part in found for text in part), None)


def same_constant(first: Any, second: Any) -> bool:
    """Whether two operands that are not nodes are one constant: by kind and value, bit by bit for floats.

    Lists and tuples of the same constants are the same.
    """
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        return len(first) == len(second) and all(map(same_constant, first, second))
    if type(first) is not type(second):
        return False
    return format_value(first) == format_value(second) if isinstance(first, float | complex) else bool(first == second)


def _header(first: Program, second: Program) -> Iterator[str]:
    for name in {**first.dims, **second.dims}:
        dims = [(dim.min, dim.max) if (dim := program.dims.get(name)) else None for program in (first, second)]
        if dims[0] != dims[1]:
            yield f"the dimension {name!r} ranges over {dims[0]} and {dims[1]}"
    if sorted(first.symbols.conditions) != sorted(second.symbols.conditions):
        yield f"the conditions are {first.symbols.conditions} and {second.symbols.conditions}"
    if first.aliases != second.aliases:
        yield f"the aliases are {first.aliases} and {second.aliases}"
    one, other = first.signature, second.signature
    for part in ("in_spec", "out_spec", "inputs", "parameters"):
        if getattr(one, part) != getattr(other, part):
            yield f"the signatures' {part} are {getattr(one, part)} and {getattr(other, part)}"
    for place in {**one.constants, **other.constants}:
        if not same_constant(one.constants.get(place, _MISSING), other.constants.get(place, _MISSING)):
            yield f"the signatures' constants are {dict(one.constants)} and {dict(other.constants)}"


_MISSING = object()


def describe_weight(tensor: torch.Tensor) -> str:
    """Kind, type and flag of a weight, as the text form writes them: ``weight f32[3, 4] frozen``."""
    is_parameter = isinstance(tensor, nn.Parameter)
    flag = "" if tensor.requires_grad == is_parameter else " trained" if tensor.requires_grad else " frozen"
    return f"{'weight' if is_parameter else 'buffer'} {TensorType(tensor.dtype, tuple(tensor.shape))}{flag}"


def _weights(first: Program, second: Program, values: bool) -> Iterator[str]:
    ours, theirs = first.tensors(), second.tensors()
    for name in {**ours, **theirs}:
        if name not in ours or name not in theirs:
            yield f"only the {'first' if name in ours else 'second'} has the weight {name!r}"
            continue
        kinds = describe_weight(ours[name]), describe_weight(theirs[name])
        if kinds[0] != kinds[1]:
            yield f"{name!r} is {kinds[0]} and {kinds[1]}"
        elif values and not same_bits(ours[name], theirs[name]):
            yield f"the values of the weight {name!r} differ"


def same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors of one dtype and shape hold the same bits; tensors without values are equal to none."""
    if first is second:
        return True
    if first.is_meta or second.is_meta:
        return False
    raw = [
        tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8)
        for tensor in (first, second)
    ]
    return torch.equal(raw[0], raw[1])


def _nodes(first: Program, second: Program, names: bool, provenance: bool) -> Iterator[str]:
    printers = [Printer(program, types=True, provenance=False) for program in (first, second)]
    ours, theirs = ([node for node in program.nodes if node.op != "get_attr"] for program in (first, second))
    stands_for: dict[fx.Node, fx.Node] = {}
    weights = {str(node.target): node for node in second.nodes if node.op == "get_attr"}
    weight_pairs = [
        (node, weights[str(node.target)])
        for node in first.nodes
        if node.op == "get_attr" and str(node.target) in weights
    ]
    for one, other in [*weight_pairs, *zip(ours, theirs)]:
        stands_for[one] = other
        kinds = printers[0].kind(one), printers[1].kind(other)
        if op_name(one) != op_name(other) or (one.op == "placeholder" and one.target != other.target):
            yield f"'{printers[0].line(one)}' and '{printers[1].line(other)}' are different operators"
        elif not same_operands(one.args, other.args, stands_for) or not same_operands(
            one.kwargs, other.kwargs, stands_for
        ):
            yield f"'{printers[0].line(one)}' and '{printers[1].line(other)}' have different operands"
        elif kinds[0] != kinds[1]:
            yield f"{describe(one)} is {kinds[0]}, {describe(other)} is {kinds[1]}"
        elif names and one.name != other.name:
            yield f"the names are %{one.name} and %{other.name}"
        elif provenance and _provenance(one) != _provenance(other):
            yield f"the provenance of {describe(one)} is {_provenance(one)} and {_provenance(other)}"
    if len(ours) != len(theirs):
        longer = ours if len(ours) > len(theirs) else theirs
        yield f"{len(ours)} and {len(theirs)} nodes; {describe(longer[min(len(ours), len(theirs))])} has no counterpart"


def same_operands(first: Any, second: Any, stands_for: Mapping[fx.Node, fx.Node]) -> bool:
    """Whether operands agree when each node of the first stands for the given node of the second."""
    if isinstance(first, fx.Node) or isinstance(second, fx.Node):
        return isinstance(first, fx.Node) and stands_for.get(first) is second
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return first.keys() == second.keys() and all(same_operands(first[k], second[k], stands_for) for k in first)
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        return len(first) == len(second) and all(same_operands(a, b, stands_for) for a, b in zip(first, second))
    return same_constant(first, second)


def _provenance(node: fx.Node) -> tuple[str, list[str], str]:
    return path_of(node), sorted(tags_of(node)), source_of(node)
