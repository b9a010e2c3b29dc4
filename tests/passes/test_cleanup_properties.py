"""Random programs: cleanup changes nothing but the program's size, stops, and leaves nothing to clean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn
from torch.utils import _pytree as pytree

import graphwright as gw
from graphwright.ir.signature import Signature
from graphwright.ir.types import VAL, Dim, SymbolTable, TensorType
from graphwright.ir.verifier import verify

WIDTH = 4
TABLE: torch.Tensor = torch.linspace(-1, 1, WIDTH)

# One step of a random program: takes a value [batch, 3, WIDTH] and another, and gives one of that shape.
Step = tuple[str, int, int, float]
STEPS: dict[str, Callable[..., Any]] = {
    # arithmetic, sometimes with a neutral element
    "add": lambda rw, x, y, c, like: rw.call("aten.add.Tensor", x, y, like=like),
    "sub": lambda rw, x, y, c, like: rw.call("aten.sub.Tensor", x, y, like=like),
    "mul": lambda rw, x, y, c, like: rw.call("aten.mul.Tensor", x, y, like=like),
    "add constant": lambda rw, x, y, c, like: rw.call("aten.add.Tensor", x, c, like=like),
    "sub constant": lambda rw, x, y, c, like: rw.call("aten.sub.Tensor", x, c if c is not True else 1, like=like),
    "mul constant": lambda rw, x, y, c, like: rw.call("aten.mul.Tensor", x, c, like=like),
    "div constant": lambda rw, x, y, c, like: rw.call("aten.div.Tensor", x, c or 1.0, like=like),
    "reciprocal": lambda rw, x, y, c, like: rw.call("aten.reciprocal", x, like=like),
    "relu": lambda rw, x, y, c, like: rw.call("aten.relu", x, like=like),
    "sin": lambda rw, x, y, c, like: rw.call("aten.sin", x, like=like),
    # moves
    "transpose": lambda rw, x, y, c, like: rw.call("aten.transpose.int", x, 1, 1 if c > 0 else -2, like=like),
    "there and back": lambda rw, x, y, c, like: rw.call(
        "aten.transpose.int", rw.call("aten.transpose.int", x, 1, 2, like=like), -1, -2, like=like
    ),
    "permutations": lambda rw, x, y, c, like: rw.call(
        "aten.permute", rw.call("aten.permute", x, [2, 0, 1], like=like), [1, 2, 0] if c > 0 else [1, -1, 0], like=like
    ),
    "contiguous": lambda rw, x, y, c, like: rw.call(
        "aten.mT", rw.call("aten.contiguous", rw.call("aten.mT", x, like=like), like=like), like=like
    ),
    "reshape": lambda rw, x, y, c, like: rw.call(
        "aten.reshape", rw.call("aten.reshape", x, [-1, WIDTH], like=like), [-1, 3, WIDTH], like=like
    ),
    "flatten": lambda rw, x, y, c, like: rw.call(
        "aten.unflatten.int", rw.call("aten.flatten.using_ints", x, 1, like=like), 1, [3, WIDTH], like=like
    ),
    "squeeze": lambda rw, x, y, c, like: rw.call(
        "aten.squeeze.dim", rw.call("aten.unsqueeze", x, 1, like=like), 1, like=like
    ),
    "slice": lambda rw, x, y, c, like: rw.call("aten.slice.Tensor", x, 1, 0, 2**63 - 1, like=like),
    "halves": lambda rw, x, y, c, like: rw.call(
        "aten.cat",
        [rw.call("aten.slice.Tensor", x, 2, 2, WIDTH, like=like), rw.call("aten.slice.Tensor", x, 2, 0, 2, like=like)],
        2,
        like=like,
    ),
    "flip": lambda rw, x, y, c, like: rw.call("aten.flip", x, [1], like=like),
    "chunk": lambda rw, x, y, c, like: rw.call(
        "aten.cat",
        [rw.call("py.getitem", rw.call("aten.chunk", x, 2, -1, like=like), index, like=like) for index in (1, 0)],
        -1,
        like=like,
    ),
    # casts and copies
    "double": lambda rw, x, y, c, like: rw.call(
        "aten.to.dtype", rw.call("aten.to.dtype", x, torch.float64, like=like), torch.float32, like=like
    ),
    "half": lambda rw, x, y, c, like: rw.call(
        "aten.to.dtype", rw.call("aten.to.dtype", x, torch.bfloat16, like=like), torch.float32, like=like
    ),
    "clone": lambda rw, x, y, c, like: rw.call("aten.clone", x, like=like),
    "dropout": lambda rw, x, y, c, like: rw.call("aten.dropout", x, 0.5, False, like=like),
    # constants
    "range": lambda rw, x, y, c, like: rw.call(
        "aten.add.Tensor",
        x,
        rw.call("aten.sin", rw.call("aten.arange", WIDTH, dtype=torch.float32, like=like), like=like),
        like=like,
    ),
    "table": lambda rw, x, y, c, like: rw.call(
        "aten.mul.Tensor", x, rw.call("aten.exp", rw.weight("table", TABLE, like=like), like=like), like=like
    ),
    "ones": lambda rw, x, y, c, like: rw.call(
        "aten.mul.Tensor", x, rw.call("aten.ones", [WIDTH], like=like), like=like
    ),
    "size": lambda rw, x, y, c, like: rw.call(
        "aten.mul.Tensor", x, rw.call("aten.sym_size.int", x, 0, like=like), like=like
    ),
    "mask": lambda rw, x, y, c, like: rw.call(
        "aten.where.self",
        rw.call(
            "aten.__and__.Tensor",
            rw.call("aten.gt.Scalar", x, c, like=like),
            rw.call("aten.ones", [], dtype=torch.bool, like=like),
            like=like,
        ),
        x,
        y,
        like=like,
    ),
    "dead": lambda rw, x, y, c, like: (rw.call("aten.exp", y, like=like), x)[1],
}

step = st.tuples(
    st.sampled_from(sorted(STEPS)),
    st.integers(0, 30),
    st.integers(0, 30),
    st.sampled_from([0.0, -0.0, 1.0, 0, 1, -1.0, 2.5, True]),
)


def build(steps: list[Step], outputs: int) -> gw.Program:
    """A program over one input ``x: f32[batch, 3, WIDTH]`` that computes the steps and returns the last values."""
    symbols = SymbolTable({"batch": Dim("batch", 1, None, 5)})
    spec = pytree.tree_structure(((0,), {}))
    out_spec = pytree.tree_structure(tuple(range(outputs)))
    program = gw.Program(
        fx.GraphModule(nn.Module(), fx.Graph()),
        Signature(in_spec=spec, out_spec=out_spec, inputs=("x",), constants={}, parameters=("x",)),
        symbols,
    )
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta[VAL] = symbols.fake(TensorType(torch.float32, ("batch", 3, WIDTH)))
    graph.output((x,))
    program.body.graph = graph
    values = [x]
    with program.edit() as rewriter:
        for name, first, second, constant in steps:
            left, right = values[first % len(values)], values[second % len(values)]
            values.append(STEPS[name](rewriter, left, right, constant, graph.output_node()))
        results = [rewriter.call("aten.tanh", value, like=graph.output_node()) for value in values[-outputs:]]
        while len(results) < outputs:
            results.append(results[0])
        graph.output_node().args = (tuple(results),)
    return program


def equal(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Bit for bit, the signs of zeros included; NaN equals NaN."""
    return (left.shape == right.shape and torch.equal(left.view(torch.int32), right.view(torch.int32))) or (
        torch.equal(left.isnan(), right.isnan())
        and torch.equal(left[~left.isnan()].view(torch.int32), right[~right.isnan()].view(torch.int32))
    )


INPUTS = [
    torch.randn(5, 3, WIDTH, generator=torch.Generator().manual_seed(1)),
    torch.randn(1, 3, WIDTH, generator=torch.Generator().manual_seed(2)) * 1e3,
    torch.tensor([0.0, -0.0, 1.0, -1.0, 1e-40, torch.inf, -torch.inf, 3.0, 0.5, -2.0, 7.0, 1e30]).reshape(1, 3, WIDTH),
]
PASSES: list[gw.Pass] = [
    gw.RemoveDeadCode(),
    gw.EliminateCommonSubexpressions(),
    gw.FoldConstants(),
    gw.RemoveNoOps(),
    gw.Cleanup(),
]


@given(steps=st.lists(step, min_size=1, max_size=14), outputs=st.integers(1, 3), which=st.sampled_from(range(5)))
@settings(max_examples=60)
def test_cleanup_keeps_every_bit(steps: list[Step], outputs: int, which: int) -> None:
    item = PASSES[which]
    program = build(steps, outputs)
    before = program.clone()
    size = len(program.nodes)
    changed = item(program)
    verify(program)
    assert len(program.nodes) <= size
    for x in INPUTS:
        for found, expected in zip(program(x), before(x), strict=True):
            assert equal(found, expected)
    assert not item(program), "a second run finds more"
    if not changed:
        assert str(program) == str(before)


@given(steps=st.lists(step, min_size=1, max_size=14))
@settings(max_examples=20)
def test_cleanup_leaves_nothing_to_any_of_its_passes(steps: list[Step]) -> None:
    program = build(steps, 1)
    gw.Cleanup()(program)
    for item in PASSES:
        assert not item(program), item.name
    assert all(node.users for node in program.nodes if node.op in ("call_function", "get_attr"))


@given(steps=st.lists(step, min_size=1, max_size=10))
@settings(max_examples=10)
def test_cleanup_passes_verification(steps: list[Step]) -> None:
    program = build(steps, 2)
    report = gw.run_passes(program, PASSES, [gw.Verifier([INPUTS[0]])])
    assert len(report.rows) == len(PASSES)
