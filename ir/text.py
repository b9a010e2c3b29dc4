"""The text form of a program: one line per value, readable, and exact enough to be parsed back.

::

    program Net(batch: 1.., sequence: 1..512@16) {
      forward x
      takes (input "x",)
      gives *

      %w = weight "up.weight" : f32[32, 16]
      %x = input "x" : f32[batch, sequence, 16]
      %linear = aten.linear(%x, %w) : f32[batch, sequence, 32]  @up #fused "net.py:12"
      return %linear
    }

``1..512@16`` is a dimension from 1 to 512 that was 16 when the model was traced. After a value come its type, its
module path (``@``), its tags (``#``) and the line of the user's code. A weight may be ``frozen`` (no gradient) and have
``strides``. :func:`graphwright.ir.parser.parse` reads all of it back.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import torch
from torch import fx

from graphwright.ir import provenance
from graphwright.ir.errors import ProgramError
from graphwright.ir.literals import format_value
from graphwright.ir.names import target_name
from graphwright.ir.program import Program
from graphwright.ir.signature_text import default_signature, signature_lines
from graphwright.ir.types import Dim, ScalarType, TensorType, TupleType, ValueType

# What may stand without quotes after @ and #; the parser reads the same.
BARE_PATH = re.compile(r"[A-Za-z0-9_./\-]+")
BARE_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_UNBACKED = re.compile(r"\bu\d+\b")


def print_program(program: Program, *, types: bool = True, provenance: bool = True) -> str:
    """The text form of a program, ending in a newline.

    Args:
        program: may be malformed; what has no written form is shown with a question mark and does not parse back.
        types: write the type of every value. Without them the text parses back only together with the weights.
        provenance: write module paths, tags and source lines.
    """
    return "\n".join(Printer(program, types=types, provenance=provenance).lines()) + "\n"


def print_node(program: Program, node: fx.Node, *, types: bool = True, provenance: bool = True) -> str:
    """The line of one node, without indentation."""
    return Printer(program, types=types, provenance=provenance).line(node)


def lines_around(program: Program, node: fx.Node, radius: int = 2) -> list[str]:
    """The lines of a node and its neighbours, the node's own marked with ``>``; weights are left out unless meant."""
    printer = Printer(program, types=True, provenance=False)
    shown = [other for other in program.nodes if other is node or other.op != "get_attr"]
    place = shown.index(node)
    return [
        f"{'>' if other is node else ' '} {printer.line(other)}"
        for other in shown[max(0, place - radius) : place + radius + 1]
    ]


class Printer:
    """Writes the lines of one program."""

    def __init__(self, program: Program, *, types: bool, provenance: bool) -> None:
        self.program = program
        self.types = types
        self.provenance = provenance
        self._unbacked: dict[str, str] = {}

    def lines(self) -> Iterator[str]:
        """The whole text, line by line."""
        program = self.program
        title = program.title if BARE_WORD.fullmatch(program.title) else json.dumps(program.title)
        yield f"program {title}({', '.join(map(format_dim, program.dims.values()))}) {{"
        header = [f"require {json.dumps(condition)}" for condition in program.symbols.conditions]
        header += [f"alias {json.dumps(alias)} = {json.dumps(name)}" for alias, name in program.aliases.items()]
        if program.signature != default_signature([str(node.target) for node in program.inputs], self._results()):
            header += signature_lines(program.signature)
        yield from (f"  {line}" for line in header)
        if header:
            yield ""
        yield from (f"  {self.line(node)}" for node in program.nodes)
        yield "}"

    def line(self, node: fx.Node) -> str:
        """The line of one node, without indentation."""
        if node.op == "output":
            results = node.args[0] if node.args else ()
            listed = results if isinstance(results, tuple | list) else [results]
            return f"return {', '.join(map(format_value, listed))}".rstrip() + self._suffix(node)
        return f"%{node.name} = {self._right_side(node)}{self._type(node)}{self._suffix(node)}"

    def _results(self) -> int:
        output = next((node for node in self.program.nodes if node.op == "output"), None)
        results = output.args[0] if output is not None and output.args else ()
        return len(results) if isinstance(results, tuple | list) else 1

    def _right_side(self, node: fx.Node) -> str:
        if node.op == "placeholder":
            return f"input {json.dumps(str(node.target))}"
        if node.op == "get_attr":
            tensor = self._tensor(node)
            kind = "weight" if tensor is None or isinstance(tensor, torch.nn.Parameter) else "buffer"
            return f"{kind} {json.dumps(str(node.target))}"
        arguments = [format_value(value) for value in node.args]
        arguments += [f"{name}={format_value(value)}" for name, value in node.kwargs.items()]
        try:
            called = target_name(node.target) if node.op == "call_function" else f"?{node.op} {node.target}"
        except ProgramError:
            called = f"?{node.target}"
        return f"{called}({', '.join(arguments)})"

    def _tensor(self, node: fx.Node) -> torch.Tensor | None:
        try:
            return self.program.tensor(node)
        except ProgramError:
            return None

    def _type(self, node: fx.Node) -> str:
        if not self.types:
            return ""
        kind = self.kind(node)
        text = "" if kind is None else f" : {kind}"
        if node.op == "get_attr":
            tensor = self._tensor(node)
            if tensor is not None and not tensor.is_contiguous():
                text += f" strides ({', '.join(map(str, tensor.stride()))})"
        return text

    def kind(self, node: fx.Node) -> ValueType | None:
        """The type of a node, with sizes that depend on values numbered in the order in which they are asked for.

        torch numbers them on with every inference; so counted, two programs have equal types if they have the same.
        """
        return self.numbered(self.program.type_of(node))

    def numbered(self, kind: ValueType | None) -> ValueType | None:
        """A type with such sizes renamed."""
        if isinstance(kind, TensorType):
            shape = tuple(self._renamed(size) if isinstance(size, str) else size for size in kind.shape)
            return TensorType(kind.dtype, shape)
        if isinstance(kind, ScalarType):
            return ScalarType(kind.kind, self._renamed(kind.expression))
        if isinstance(kind, TupleType):
            return TupleType(tuple(map(self.numbered, kind.items)))
        return None

    def _renamed(self, expression: str) -> str:
        def new_name(found: re.Match[str]) -> str:
            name = found.group()
            return name if name in self.program.dims else self._unbacked.setdefault(name, f"u{len(self._unbacked)}")

        return _UNBACKED.sub(new_name, expression)

    def _suffix(self, node: fx.Node) -> str:
        parts: list[str] = []
        if node.op == "get_attr" and (tensor := self._tensor(node)) is not None:
            if tensor.requires_grad != isinstance(tensor, torch.nn.Parameter):
                parts.append("trained" if tensor.requires_grad else "frozen")
        if self.provenance:
            path, source = provenance.path_of(node), provenance.source_of(node)
            if path:
                parts.append("@" + (path if BARE_PATH.fullmatch(path) else json.dumps(path)))
            for tag in sorted(provenance.tags_of(node)):
                parts.append("#" + (tag if BARE_PATH.fullmatch(tag) else json.dumps(tag)))
            if source:
                parts.append(json.dumps(source))
        return "".join(f"{'  ' if index == 0 else ' '}{part}" for index, part in enumerate(parts))


def format_dim(dim: Dim) -> str:
    """``sequence: 1..512@16``; the hint is left out when it is the default."""
    largest = "" if dim.max is None else str(dim.max)
    hint = "" if dim.hint == Dim(dim.name).hint else f"@{dim.hint}"
    return f"{dim.name}: {dim.min}..{largest}{hint}"
