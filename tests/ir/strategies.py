"""Random small programs: written as text with drawn operators, names, types of weights, provenance and signature.

They are built by the parser, so what the tests then compare is the second time around; the numbers are checked against
running the operators one by one in :func:`reference`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import fx

from graphwright.ir.literals import format_float
from graphwright.ir.parser import parse
from graphwright.ir.program import Program

WIDTH = 4
UNARY = ("relu", "neg", "tanh", "sigmoid", "abs", "exp", "alias")
BINARY = ("add.Tensor", "sub.Tensor", "mul.Tensor", "maximum")
_NAMES = st.sampled_from(["x", "hidden", "linear", "add_1", "_private", "Mixed", "a_1", "a_2", "a", "very_long_name_7"])
_PATHS = st.one_of(st.just(""), st.sampled_from(["encoder.layer.0", "a b", "head", 'q"uote', "ünï"]))
_TAGS = st.frozensets(st.sampled_from(["quantized", "adapter", "two words", "#", "a/b-c.d"]), max_size=3)
_SOURCES = st.one_of(st.just(""), st.text(max_size=8), st.just("net.py:12"))
FLOATS = st.floats(width=32) | st.sampled_from([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1e-12])


@dataclass
class _Writer:
    """The lines of a program under way, and which values of which shape it has."""

    draw: Any
    lines: list[str] = field(default_factory=list)
    values: list[tuple[str, int]] = field(default_factory=list)  # name, number of rows as a multiple of `batch`
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)

    def name(self) -> str:
        wanted = self.draw(_NAMES)
        name, count = wanted, 0
        while name in self.used:
            name, count = f"{wanted}_{count + 10}", count + 1
        self.used.add(name)
        return str(name)

    def provenance(self) -> str:
        path, tags, source = self.draw(_PATHS), self.draw(_TAGS), self.draw(_SOURCES)
        parts = [f"@{json.dumps(path)}"] if path else []
        parts += [f"#{json.dumps(tag)}" for tag in tags]
        return "  " + " ".join(parts + ([json.dumps(source)] if source else []))

    def emit(self, call: str, rows: int) -> None:
        name = self.name()
        self.lines.append(f"%{name} = {call}{self.provenance()}")
        self.values.append((name, rows))

    def weight(self, shape: list[int]) -> str:
        name, target = (
            self.name(),
            f"{self.draw(st.sampled_from(['w', 'a.b.w', 'a.c', '0.weight']))}_{len(self.weights)}",
        )
        generator = torch.Generator().manual_seed(len(self.weights))
        tensor = torch.randn(shape, generator=generator)
        strides = ""
        if len(shape) == 2 and self.draw(st.booleans()):
            tensor = tensor.t().contiguous().t()
            strides = f" strides (1, {shape[0]})"
        kind = self.draw(st.sampled_from(["weight", "buffer"]))
        flag = {"weight": " frozen", "buffer": " trained"}[kind] if self.draw(st.booleans()) else ""
        self.weights[target] = tensor
        self.lines.append(
            f'%{name} = {kind} "{target}" : f32[{", ".join(map(str, shape))}]{strides}{flag}{self.provenance()}'
        )
        return name

    def call(self) -> None:
        draw = self.draw
        (x, rows), kind = draw(st.sampled_from(self.values)), draw(st.integers(0, 7))
        if kind <= 1:
            self.emit(f"aten.{draw(st.sampled_from(UNARY))}(%{x})", rows)
        elif kind == 2:
            y = draw(st.sampled_from([name for name, other in self.values if other == rows]))
            self.emit(f"aten.{draw(st.sampled_from(BINARY))}(%{x}, %{y})", rows)
        elif kind == 3:
            number = format_float(draw(FLOATS))
            self.emit(f"aten.{draw(st.sampled_from(['mul.Tensor', 'add.Tensor']))}(%{x}, {number})", rows)
        elif kind == 4:
            weight = self.weight([WIDTH, WIDTH])
            bias = f", %{self.weight([WIDTH])}" if draw(st.booleans()) else ""
            self.emit(f"aten.linear(%{x}, %{weight}{bias})", rows)
        elif kind == 5 and rows < 4:
            self.emit(f"aten.cat([%{x}, %{x}])", 2 * rows)
        elif kind == 6:
            split = self.name()
            self.lines.append(f"%{split} = aten.split.Tensor(%{x}, 2, -1){self.provenance()}")
            parts = [self.name(), self.name()]
            self.lines += [f"%{part} = py.getitem(%{split}, {place})" for place, part in enumerate(parts)]
            self.emit(f"aten.cat([%{parts[1]}, %{parts[0]}], -1)", rows)
        else:
            self.emit(f"aten.clamp(%{x}, None, {format_float(draw(FLOATS))})", rows)


@st.composite
def programs(draw: Any) -> Program:
    """A small program over inputs ``f32[batch, 4]``, with real weights."""
    writer = _Writer(draw)
    inputs = [f"in_{number}" for number in range(draw(st.integers(1, 3)))]
    header = []
    for place, target in enumerate(inputs):
        name = writer.name() if draw(st.booleans()) else target
        writer.used.add(name)
        writer.lines.append(f'%{name} = input "{target}" : f32[batch, {WIDTH}]{writer.provenance() if place else ""}')
        writer.values.append((name, 1))
    for _ in range(draw(st.integers(1, 6))):
        writer.call()
    results = draw(st.lists(st.sampled_from([name for name, _ in writer.values]), min_size=1, max_size=3))
    if draw(st.booleans()):
        header.append('require "batch != 1000"')
    if writer.weights and draw(st.booleans()):
        header.append(f'alias "tied.w" = "{draw(st.sampled_from(sorted(writer.weights)))}"')
    if draw(st.booleans()):
        leaves = ", ".join(
            f'"{target}": [input "{target}", {draw(st.sampled_from(["None", "1.5", "True"]))}]' for target in inputs
        )
        keys = ", ".join(f'"{place}": *' for place in range(len(results)))
        header += [f"forward {', '.join(inputs)}", f"takes ((), {{{leaves}}})", f"gives [{{{keys}}}]"]
    limit = draw(st.sampled_from(["1..", "1..7", "2..500@6"]))
    returned = ", ".join(f"%{name}" for name in results)
    body = "\n".join([*header, *writer.lines, f"return {returned}"])
    return parse(f"program Drawn(batch: {limit}) {{\n{body}\n}}", writer.weights)


def inputs_of(program: Program, batch: int = 3) -> list[torch.Tensor]:
    """Flat inputs for a drawn program."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(batch, WIDTH, generator=generator) for _ in program.inputs]


def reference(program: Program, flat: list[torch.Tensor]) -> list[torch.Tensor]:
    """The outputs of a program, its operators called one by one."""
    values: dict[fx.Node, Any] = dict(zip(program.inputs, flat, strict=True))
    for node in program.nodes:
        if node.op == "get_attr":
            values[node] = program.tensor(str(node.target))
        elif node.op == "call_function":
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return [values[item] for item in program.output.args[0]]
