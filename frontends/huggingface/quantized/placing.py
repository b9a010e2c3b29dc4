"""What of a program belongs to which module of its architecture, so that it can be written under its name."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from graphwright.frontends.huggingface.quantized.architecture import Architecture, LinearPlace
from graphwright.frontends.huggingface.quantized.modules import GroupedWeight, IntegerWeight
from graphwright.ir.arguments import arguments_of
from graphwright.ir.errors import ExportError
from graphwright.ir.names import op_name
from graphwright.ir.program import Program
from graphwright.ir.provenance import path_of, tags_of

_GROUPED, _DYNAMIC, _STATIC = (
    f"graphwright.{name}" for name in ("linear_nbits", "linear_int8_dynamic", "linear_int8_static")
)
_FLOAT = "aten.linear"
# Module that merged linears become -> what they may have been, in the order in which rows are stacked.
_MERGED: dict[str, tuple[tuple[str, ...], ...]] = {
    "qkv_proj": (
        *(("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q", "k", "v"), ("q_lin", "k_lin", "v_lin")),
        *(("query_proj", "key_proj", "value_proj"), ("to_q", "to_k", "to_v")),
    ),
    "kv_proj": (("k_proj", "v_proj"), ("key", "value"), ("k", "v"), ("k_lin", "v_lin"), ("to_k", "to_v")),
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3"), ("wi_0", "wi_1"), ("gate", "up")),
}


@dataclass(frozen=True)
class PlacedLinear:
    """A quantised linear of a program under its name in the architecture.

    Attributes:
        place: the linear of the architecture.
        weight: its rows.
        bias: ``[out]``, or ``None``.
    """

    place: LinearPlace
    weight: GroupedWeight | IntegerWeight
    bias: torch.Tensor | None


def quantized_linears(program: Program, architecture: Architecture) -> dict[str, PlacedLinear]:
    """Every quantised linear by its module's name; merged ones are cut into those that they were.

    Raises:
        ExportError: one has no place in the architecture, or reads its input in an order that is none.
    """
    found: dict[str, PlacedLinear] = {}
    for node in program.nodes:
        if op_name(node) not in (_GROUPED, _DYNAMIC, _STATIC):
            if "quantized" in tags_of(node) and op_name(node) in (
                "graphwright.linear_codebook",
                "graphwright.embedding_nbits",
            ):
                raise ExportError(
                    f"%{node.name} is a {op_name(node).partition('.')[2]}, for which these layouts have no form",
                    where=f"module {path_of(node)!r}",
                    hint="leave it in floating point, or store linears as integers",
                )
            continue
        weight, bias = _weight(program, node), arguments_of(node)["bias"]
        values = program.tensor(bias) if isinstance(bias, fx.Node) else None
        for place, rows in _places(program, architecture, node):
            part = _rows(weight, rows)
            found[place.name] = PlacedLinear(place, part, values[rows] if values is not None else None)
    return found


def float_parts(program: Program, architecture: Architecture) -> dict[str, tuple[torch.Tensor, torch.Tensor | None]]:
    """Weight ``[out, in]`` and bias of every linear in floating point by its module's name, merged ones in parts."""
    found: dict[str, tuple[torch.Tensor, torch.Tensor | None]] = {}
    for node in program.nodes:
        if op_name(node) != _FLOAT:
            continue
        arguments = arguments_of(node)
        weight, bias = arguments["weight"], arguments["bias"]
        if weight.op != "get_attr" or (isinstance(bias, fx.Node) and bias.op != "get_attr"):
            continue
        values, shift = program.tensor(weight), program.tensor(bias) if isinstance(bias, fx.Node) else None
        try:
            places = list(_places(program, architecture, node))
        except ExportError:
            continue  # no linear of the architecture, such as the weights of an adapter
        for place, rows in places:
            found[place.name] = values[rows], shift[rows] if shift is not None else None
    return found


def _weight(program: Program, node: fx.Node) -> GroupedWeight | IntegerWeight:
    arguments = arguments_of(node)
    qweight, scales = program.tensor(arguments["qweight"]), program.tensor(arguments["scales"])
    if op_name(node) == _GROUPED:
        zeros = arguments["zero_points"]
        points = program.tensor(zeros) if isinstance(zeros, fx.Node) else None
        order = _order(program, arguments["x"])
        return GroupedWeight(qweight, scales, points, arguments["bits"], arguments["group_size"], order)
    if op_name(node) == _DYNAMIC:
        return IntegerWeight(qweight, scales, arguments["activation"])
    factors = program.tensor(arguments["input_scales"])
    return IntegerWeight(qweight, scales, "static", factors, arguments["input_zero_point"])


def _order(program: Program, x: fx.Node) -> torch.Tensor | None:
    """The order in which a linear reads its input's features, where they are brought into another one before."""
    if op_name(x) != "aten.index_select":
        return None
    arguments = arguments_of(x)
    index, rank = arguments["index"], len(getattr(program.type_of(x), "shape", ()))
    if index.op != "get_attr" or arguments["dim"] not in (-1, rank - 1):
        return None
    order = program.tensor(index)
    return order if torch.equal(order.sort().values, torch.arange(len(order))) else None


def _places(program: Program, architecture: Architecture, node: fx.Node) -> Iterator[tuple[LinearPlace, slice]]:
    """The linears of the architecture that a node computes, each with its rows of the weight."""
    arguments = arguments_of(node)
    weight = arguments["qweight"] if "qweight" in arguments else arguments["weight"]
    rows = program.tensor(weight).shape[0]
    names = [str(weight.target).rpartition(".")[0], path_of(node)]
    for name in names:
        if name in architecture.linears and architecture.linears[name].outputs == rows:
            yield architecture.linears[name], slice(0, rows)
            return
    for name in names:
        parent, _, leaf = name.rpartition(".")
        for parts in _MERGED.get(leaf, ()):
            places = [architecture.linears.get(f"{parent}.{part}" if parent else part) for part in parts]
            known = [place for place in places if place is not None]
            if len(known) < len(parts) or sum(place.outputs for place in known) != rows:
                continue
            start = 0
            for place in known:
                yield place, slice(start, start + place.outputs)
                start += place.outputs
            return
    raise ExportError(
        f"%{node.name} with the weight {weight.target!r} ({rows} rows) is no linear of the original architecture",
        where=f"module {path_of(node)!r}",
        hint="save before passes that merge or replace linears",
    )


def _rows(weight: GroupedWeight | IntegerWeight, rows: slice) -> GroupedWeight | IntegerWeight:
    if isinstance(weight, IntegerWeight):
        return dataclasses.replace(weight, qweight=weight.qweight[rows], scales=weight.scales[rows])
    zeros = weight.zero_points[rows] if weight.zero_points is not None else None
    return dataclasses.replace(weight, qweight=weight.qweight[rows], scales=weight.scales[rows], zero_points=zeros)
