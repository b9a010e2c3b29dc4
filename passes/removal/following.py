"""Following units through a program: which elements of which values go together, operator by operator."""

from __future__ import annotations

from torch import fx

from graphwright.ir.decoder import DecoderLayout
from graphwright.ir.names import op_name
from graphwright.ir.program import Program
from graphwright.ir.provenance import describe, tags_of
from graphwright.passes.removal.operators import KEEPS_ZERO, NORMS, RULES, is_elementwise
from graphwright.passes.removal.units import Axis, Units

# Operators that only look at sizes or dtypes.
_LOOKS = frozenset({"aten._assert_tensor_metadata"})


def follow(program: Program, seeds: list[Axis], respects: frozenset[str]) -> Units:
    """The units that the elements along some dimensions belong to, followed to wherever they reach.

    Args:
        program: typed.
        seeds: dimensions of fixed size; each element begins as a unit of its own.
        respects: tags of nodes whose weights must stay.
    """
    units = Units(program)
    for seed in seeds:
        units.of(seed)
    waiting: list[fx.Node] = []
    while units.touched or waiting:
        for node in units.touched:
            waiting += [node, *units.readers(node)]
        units.touched.clear()
        _visit(units, waiting.pop(), respects)
    _require_zeros(units)
    return units


def _visit(units: Units, node: fx.Node, respects: frozenset[str]) -> None:
    known = _known(units, node)
    if not known or op_name(node) in _LOOKS or node.op == "get_attr":
        return
    covered: set[Axis] = set()
    reason = ""
    if node.op in ("placeholder", "output"):
        covered = _heads_of_caches(units, node)
    if node.op == "placeholder":
        reason = f"they are part of the program's input %{node.name}"
    elif node.op == "output":
        reason = f"%{next(iter([axis for axis in known if axis not in covered] or known)).node.name} leaves the program"
    elif tags_of(node) & respects:
        reason = f"{describe(node)} is tagged {', '.join(sorted(tags_of(node) & respects))}"
    else:
        rule = RULES.get(op_name(node))
        covered = rule(units, node) if rule is not None else set()
        fused = " (FuseRMSNorm and FuseLayerNorm turn norms into one operator)" if "mean" in op_name(node) else ""
        reason = f"{describe(node)} ({op_name(node)}) does not let them be followed{fused}"
    for axis in known:
        if axis not in covered:
            units.keep(axis, reason)


def _heads_of_caches(units: Units, node: fx.Node) -> set[Axis]:
    """The heads of a decoding step's caches, which whoever runs it makes anew: as many as it has."""
    layout = DecoderLayout.find(units.program)
    if layout is None:
        return set()
    caches = layout.caches(units.program)
    if node.op == "output":
        caches = [each for each in units.program.results[1 : 1 + len(caches)] if isinstance(each, fx.Node)]
        return {Axis(each, 1) for each in caches}
    return {Axis(node, 1)} if node in caches else set()


def _known(units: Units, node: fx.Node) -> list[Axis]:
    places = [(each, place) for each in (node, *node.all_input_nodes) for place in range(len(units.shape(each)))]
    return [axis for axis in dict.fromkeys(units.axis(*each) for each in places) if units.has(axis)]


def _require_zeros(units: Units) -> None:
    """Keep what a norm reads and is not zero where the weights that make it are: then less than the norm would go."""
    normed = {
        label
        for axis in units.labels
        if op_name(axis.node) in NORMS and axis.place == len(units.shape(axis.node)) - 1
        for label in units.of(axis).tolist()
    } - {0}
    for axis in list(units.labels):
        name = op_name(axis.node)
        if is_elementwise(name) and name not in KEEPS_ZERO and normed & set(units.of(axis).tolist()):
            reason = f"{describe(axis.node)} ({name}) makes something of zeros, and a norm reads it"
            units.keep(axis, reason)
