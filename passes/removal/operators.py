"""What operators do to units: for each, which dimensions of what it reads and gives go together.

A rule links dimensions and returns those that it speaks for; whatever else is known along the operator's dimensions has
to stay. Rules may be applied again when more is known.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from graphwright.ir.arguments import arguments_of
from graphwright.ir.names import op_name
from graphwright.passes.removal.regrouping import regroup
from graphwright.passes.removal.units import Axis, Units

Rule = Callable[[Units, fx.Node], set[Axis]]

# Operators that give zero where every operand is zero; removed features are zero wherever one of these makes them.
KEEPS_ZERO = frozenset(
    f"aten.{name}"
    for name in (
        *("add.Tensor", "sub.Tensor", "mul.Tensor", "mul.Scalar", "div.Tensor", "div.Scalar", "neg", "abs", "relu"),
        *(
            "gelu",
            "silu",
            "tanh",
            "square",
            "dropout",
            "clone",
            "contiguous",
            "alias",
            "detach",
            "to.dtype",
            "_to_copy",
        ),
        *("to.device", "to.dtype_layout", "leaky_relu", "elu", "mish"),
    )
) | {"graphwright.gated_activation", "graphwright.fake_quantize", "graphwright.apply_mask"}
_ELEMENTWISE = KEEPS_ZERO | frozenset(
    f"aten.{name}"
    for name in (
        *("add.Scalar", "sub.Scalar", "rsub.Scalar", "sigmoid", "exp", "sqrt", "rsqrt", "reciprocal", "clamp", "erf"),
        *(
            "pow.Tensor_Scalar",
            "masked_fill.Scalar",
            "masked_fill.Tensor",
            "where.self",
            "where.ScalarOther",
            "where.ScalarSelf",
            "where.Scalar",
            "softplus",
            "hardswish",
        ),
        *("hardsigmoid", "maximum", "minimum", "logical_and", "logical_not", "ge.Scalar", "gt.Scalar", "lt.Scalar"),
    )
)


def is_elementwise(name: str) -> bool:
    """Whether an operator computes every element from those at its place."""
    return name in _ELEMENTWISE


def linked(units: Units, pairs: list[tuple[Axis, Axis]]) -> set[Axis]:
    """Link pairs of dimensions of which something is known on either side; returns all of them."""
    for one, other in pairs:
        if units.has(one) or units.has(other):
            units.link(one, other)
    return {axis for pair in pairs for axis in pair}


def _elementwise(units: Units, node: fx.Node) -> set[Axis]:
    pairs: list[tuple[Axis, Axis]] = []
    shape = units.shape(node)
    for source in node.all_input_nodes:
        read = units.shape(source)
        for back in range(1, min(len(read), len(shape)) + 1):
            # A size of 1 that is stretched has nothing that could be removed.
            if read[-back] == shape[-back] and isinstance(read[-back], int):
                pairs.append((units.axis(source, -back), units.axis(node, -back)))
    return linked(units, pairs)


def _alike(units: Units, one: fx.Node, other: fx.Node, places: list[tuple[int, int]]) -> list[tuple[Axis, Axis]]:
    sizes = units.shape(one), units.shape(other)
    return [
        (units.axis(one, a), units.axis(other, b))
        for a, b in places
        if isinstance(sizes[0][a], int) and sizes[0][a] == sizes[1][b]
    ]


def _linear(units: Units, node: fx.Node) -> set[Axis]:
    given = arguments_of(node)
    x, weight, bias = given["input"], given["weight"], given["bias"]
    pairs = [(units.axis(x, -1), units.axis(weight, 1)), (units.axis(node, -1), units.axis(weight, 0))]
    pairs += _alike(units, x, node, [(place, place) for place in range(len(units.shape(x)) - 1)])
    return linked(units, [*pairs, *([(units.axis(node, -1), units.axis(bias, 0))] if bias is not None else [])])


def _addmm(units: Units, node: fx.Node) -> set[Axis]:
    given = arguments_of(node)
    bias, x, weight = given["self"], given["mat1"], given["mat2"]
    pairs = [(units.axis(x, 1), units.axis(weight, 0)), (units.axis(node, 1), units.axis(weight, 1))]
    pairs += _alike(units, bias, node, [(-1, -1)])
    return linked(units, pairs + _alike(units, x, node, [(0, 0)]))


def _product(units: Units, node: fx.Node) -> set[Axis]:
    left, right = node.args[0], node.args[1]
    assert isinstance(left, fx.Node)
    assert isinstance(right, fx.Node)
    ranks = [len(units.shape(each)) for each in (left, right, node)]
    if min(ranks) < 2:
        return set()
    pairs = _alike(units, left, right, [(-1, -2)]) + _alike(units, left, node, [(-2, -2)])
    pairs += _alike(units, right, node, [(-1, -1)])
    for side, rank in ((left, ranks[0]), (right, ranks[1])):
        pairs += _alike(units, side, node, [(-back, -back) for back in range(3, rank + 1)])
    return linked(units, pairs)


def _embedding(units: Units, node: fx.Node) -> set[Axis]:
    return linked(units, [(units.axis(node, -1), units.axis(arguments_of(node)["weight"], 1))])


def _norm(units: Units, node: fx.Node) -> set[Axis]:
    given = arguments_of(node)
    x: fx.Node = given["input"] if "input" in given else given["x"]
    if len(given.get("normalized_shape", [0])) != 1:
        return set()
    pairs = _alike(units, x, node, [(place, place) for place in range(len(units.shape(x)))])
    pairs += [(units.axis(node, -1), units.axis(given[key], -1)) for key in ("weight", "bias") if given.get(key)]
    return linked(units, pairs)


def _transpose(units: Units, node: fx.Node) -> set[Axis]:
    given, source = arguments_of(node), node.all_input_nodes[0]
    rank = len(units.shape(node))
    order = list(range(rank))
    if "dims" in given:
        order = [place % rank for place in given["dims"]]
    else:
        one, other = (given["dim0"] % rank, given["dim1"] % rank) if "dim0" in given else (0, rank - 1)
        order[one], order[other] = other, one
    return linked(units, _alike(units, source, node, [(order[place], place) for place in range(rank)]))


def _unsqueeze(units: Units, node: fx.Node) -> set[Axis]:
    source, rank = node.all_input_nodes[0], len(units.shape(node))
    rest = [place for place in range(rank) if place != arguments_of(node)["dim"] % rank]
    return linked(units, _alike(units, source, node, list(enumerate(rest))))


def _without(units: Units, node: fx.Node) -> set[Axis]:
    """``squeeze`` and ``select``: a dimension goes."""
    source = node.all_input_nodes[0]
    rank = len(units.shape(source))
    if len(units.shape(node)) == rank:
        return linked(units, _alike(units, source, node, [(place, place) for place in range(rank)]))
    rest = [place for place in range(rank) if place != arguments_of(node)["dim"] % rank]
    return linked(units, _alike(units, source, node, [(place, index) for index, place in enumerate(rest)]))


def _expand(units: Units, node: fx.Node) -> set[Axis]:
    source = node.all_input_nodes[0]
    return linked(
        units, _alike(units, source, node, [(-back, -back) for back in range(1, len(units.shape(source)) + 1)])
    )


def _slice(units: Units, node: fx.Node) -> set[Axis]:
    given, source = arguments_of(node), node.all_input_nodes[0]
    rank = len(units.shape(node))
    place = given["dim"] % rank
    covered = linked(units, _alike(units, source, node, [(other, other) for other in range(rank) if other != place]))
    whole, part = units.axis(source, place), units.axis(node, place)
    sizes = units.shape(source)[place], units.shape(node)[place], given["start"] or 0
    if not all(isinstance(size, int) for size in sizes) or not (units.has(whole) or units.has(part)):
        return covered
    if given["step"] != 1:
        return covered
    start = slice_start(given["start"], units.size(whole))
    units.link(whole, part, torch.arange(start, start + units.size(part)))
    return covered | {whole, part}


def slice_start(start: Any, size: int) -> int:
    """Where a slice begins, counted from the front."""
    begin = int(start or 0)
    return min(begin + size if begin < 0 else begin, size)


def _split(units: Units, node: fx.Node) -> set[Axis]:
    source, covered = node.all_input_nodes[0], set[Axis]()
    rank = len(units.shape(source))
    place = arguments_of(node)["dim"] % rank
    whole = units.axis(source, place)
    if not isinstance(units.shape(source)[place], int):
        return covered
    starts, start = [], 0
    for part in node.meta["val"]:
        starts.append(start)
        start += int(part.shape[place])
    for user in node.users:
        if op_name(user) != "py.getitem":
            continue
        covered |= linked(units, _alike(units, source, user, [(each, each) for each in range(rank) if each != place]))
        part = units.axis(user, place)
        if units.has(whole) or units.has(part):
            index: Any = user.args[1]
            units.link(whole, part, torch.arange(starts[index], starts[index] + units.size(part)))
        covered |= {whole, part}
    return covered


def _getitem(units: Units, node: fx.Node) -> set[Axis]:
    source = node.args[0]
    rule = RULES.get(op_name(source)) if isinstance(source, fx.Node) else None
    return rule(units, source) if rule is _split and isinstance(source, fx.Node) else set()


def _cat(units: Units, node: fx.Node) -> set[Axis]:
    given, covered = arguments_of(node), set[Axis]()
    rank = len(units.shape(node))
    place, start = given["dim"] % rank, 0
    whole = units.axis(node, place)
    for source in given["tensors"]:
        covered |= linked(units, _alike(units, source, node, [(each, each) for each in range(rank) if each != place]))
        size, part = units.shape(source)[place], units.axis(source, place)
        if not isinstance(size, int) or not isinstance(units.shape(node)[place], int):
            continue
        if units.has(whole) or units.has(part):
            units.link(whole, part, torch.arange(start, start + size))
        covered |= {whole, part}
        start += size
    return covered


def _attention(units: Units, node: fx.Node) -> set[Axis]:
    given = arguments_of(node)
    query = given["query"]
    key, value = (given["keys"], given["values"]) if "keys" in given else (given["key"], given["value"])
    if any(len(units.shape(each)) != 4 for each in (query, key, value)):
        return set()
    pairs = [(units.axis(query, -1), units.axis(key, -1)), (units.axis(value, -1), units.axis(node, -1))]
    pairs.append((units.axis(query, 1), units.axis(node, 1)))
    heads = units.size(units.axis(node, 1))
    for name in ("attn_mask", "bias"):
        mask = given.get(name)
        if isinstance(mask, fx.Node) and len(units.shape(mask)) >= 3 and units.shape(mask)[-3] == heads:
            pairs.append((units.axis(node, 1), units.axis(mask, -3)))
    if given.get("slopes") is not None:
        pairs.append((units.axis(node, 1), units.axis(given["slopes"], 0)))
    covered = linked(units, pairs)
    for each in (key, value):
        few = units.axis(each, 1)
        if units.has(units.axis(node, 1)) or units.has(few):
            copies = heads // units.size(few)
            units.link(units.axis(node, 1), few, None, torch.arange(heads) // copies)
        covered.add(few)
    return covered


def _cache_append(units: Units, node: fx.Node) -> set[Axis]:
    given = arguments_of(node)
    pairs = [(units.axis(given[name], place), units.axis(node, place)) for name in ("cache", "new") for place in (1, 3)]
    return linked(units, pairs)


def _select_rows(units: Units, node: fx.Node) -> set[Axis]:
    return linked(units, _alike(units, arguments_of(node)["x"], node, [(0, 0), (2, 2)]))


def _rotary(units: Units, node: fx.Node) -> set[Axis]:
    x = arguments_of(node)["x"]
    return linked(units, _alike(units, x, node, [(0, 0), (1, 1), (2, 2)]))


def _softmax(units: Units, node: fx.Node) -> set[Axis]:
    source, rank = node.all_input_nodes[0], len(units.shape(node))
    kept = [place for place in range(rank) if place != arguments_of(node)["dim"] % rank]
    return linked(units, _alike(units, source, node, [(place, place) for place in kept]))


def _reduced(units: Units, node: fx.Node) -> set[Axis]:
    given, source = arguments_of(node), node.all_input_nodes[0]
    rank, dims = len(units.shape(source)), given["dim"]
    gone = {place % rank for place in ([dims] if isinstance(dims, int) else dims or range(rank))}
    kept = [place for place in range(rank) if place not in gone]
    index = {place: place if given["keepdim"] else number for number, place in enumerate(kept)}
    return linked(units, _alike(units, source, node, [(place, index[place]) for place in kept]))


NORMS = frozenset({"aten.layer_norm", "aten.rms_norm", "graphwright.rms_norm"})
SPLITS = frozenset({"aten.split.Tensor", "aten.split_with_sizes", "aten.chunk"})
VIEWS = frozenset(f"aten.{name}" for name in ("view", "reshape", "_unsafe_view", "flatten.using_ints", "unflatten.int"))
ATTENTION = frozenset({"aten.scaled_dot_product_attention", "graphwright.attention", "graphwright.cached_attention"})

RULES: dict[str, Rule] = {
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    **dict.fromkeys(NORMS, _norm),
    **dict.fromkeys(SPLITS, _split),
    **dict.fromkeys(VIEWS, regroup),
    **dict.fromkeys(ATTENTION, _attention),
    **dict.fromkeys(("aten.transpose.int", "aten.permute", "aten.t"), _transpose),
    **dict.fromkeys(("aten.matmul", "aten.bmm", "aten.mm"), _product),
    **dict.fromkeys(("aten.squeeze.dim", "aten.select.int"), _without),
    **dict.fromkeys(("aten.softmax.int", "aten._softmax"), _softmax),
    **dict.fromkeys(("aten.mean.dim", "aten.sum.dim_IntList"), _reduced),
    "aten.linear": _linear,
    "aten.addmm": _addmm,
    "aten.embedding": _embedding,
    "aten.unsqueeze": _unsqueeze,
    "aten.expand": _expand,
    "aten.slice.Tensor": _slice,
    "py.getitem": _getitem,
    "aten.cat": _cat,
    "graphwright.rotary_embedding": _rotary,
    "graphwright.cache_append": _cache_append,
    "graphwright.select_rows": _select_rows,
}
