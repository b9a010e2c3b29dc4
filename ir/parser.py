"""From the text form back to a program. See :mod:`graphwright.ir.text` for what it looks like."""

from __future__ import annotations

import difflib
import functools
import keyword
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch import fx, nn

from graphwright.ir import provenance
from graphwright.ir.arguments import canonical_call
from graphwright.ir.conditions import names_in
from graphwright.ir.errors import ProgramError, TypeMismatch
from graphwright.ir.lexer import Lexer
from graphwright.ir.names import resolve_target
from graphwright.ir.program import Program
from graphwright.ir.signature import Signature
from graphwright.ir.signature_text import Leaf, default_signature, read_tree
from graphwright.ir.type_text import Agreement, read_type
from graphwright.ir.types import DECLARED, DTYPES_BY_NAME, VAL, Dim, SymbolTable, TensorType, ValueType

_CONSTANTS: dict[str, Any] = {"None": None, "True": True, "False": False}
_FLOATS = ("inf", "nan")
# Names that the code torch.fx compiles relies on.
_KEPT = frozenset({"self", "torch", "getattr", "device", "inf", "nan", "NoneType", "pytree", "fx_pytree"})


def parse(text: str, tensors: Mapping[str, torch.Tensor] | None = None, *, types: bool = True) -> Program:
    """Read a program from its text form.

    Every type is inferred anew; where the text gives one, the two must agree.

    Args:
        text: as :func:`graphwright.ir.text.print_program` writes it, or by hand: types of calls, provenance and
            everything in the header but the name and the dimensions may be left out.
        tensors: the weights by name, shared and not copied, except where the text gives strides that differ. Without
            them, weights are tensors of the written type on the meta device: a program to look at, not to run.
        types: infer types. Without, which is many times faster, calls have those that the text declares: the program
            can only be run, and weights that are not given are on the meta device.

    Raises:
        ProgramError: the text is not such a program; with line, column and the line itself.
        TypeMismatch: an operator does not take its operands, or a type is not the one written.
    """
    try:
        return _Parser(text, tensors, types).program()
    except RecursionError as error:
        raise ProgramError("the text is nested too deeply") from error


class _Parser:
    def __init__(self, text: str, tensors: Mapping[str, torch.Tensor] | None, types: bool) -> None:
        self.lexer = Lexer(text)
        self.tensors = tensors
        self.types = types
        self.graph = fx.Graph()
        self.values: dict[str, fx.Node] = {}
        self.aliases: dict[str, str] = {}
        self.conditions: list[str] = []
        self.spec: dict[str, Any] = {}
        self.weights: set[str] = set()
        self.inputs: set[str] = set()

    # -- the frame -----------------------------------------------------------------------------------------------------

    def program(self) -> Program:
        lexer = self.lexer
        lexer.expect("program")
        quoted = lexer.peek().kind == "string"
        title = lexer.string("a name") if quoted else lexer.take("word", "the program's name")
        lexer.expect("(")
        dims = self._dims()
        lexer.expect("{")
        self._header(dims)
        placeholder = default_signature([], 1)
        self.symbols = SymbolTable({dim.name: dim for dim in dims}, self.conditions)
        self.agreement = Agreement(self.symbols.dims)
        self.built = Program(
            fx.GraphModule(nn.Module(), fx.Graph()), placeholder, self.symbols, title=title, aliases=self.aliases
        )
        while lexer.peek().kind == "value":
            self._statement()
        start = lexer.place()
        if not lexer.accept("return"):
            raise lexer.error(
                f"expected a value such as '%x = ...' or 'return', found {lexer.peek()}",
                hint="header lines (require, alias, forward, takes, gives) come before the first value",
            )
        self._return()
        lexer.expect("}")
        if lexer.peek().kind != "end":
            raise lexer.error(f"expected the end of the text, found {lexer.peek()}")
        self.built.signature = self._signature(start)
        for alias, name in self.aliases.items():
            if name not in self.weights or alias in self.weights:
                raise ProgramError(f"the alias {alias!r} stands for {name!r}: one must be a weight, the other not")
        self.built.body.graph = self.graph
        return self.built

    def _dims(self) -> list[Dim]:
        lexer, dims = self.lexer, list[Dim]()
        while not lexer.accept(")"):
            start, name = lexer.place(), lexer.take("word", "the name of a dimension")
            if not name.isidentifier() or any(dim.name == name for dim in dims):
                raise lexer.error(f"{name!r} is declared twice or is not a name", at=start)
            lexer.expect(":")
            smallest = lexer.integer("the smallest size")
            lexer.expect("..")
            largest = lexer.integer("the largest size") if lexer.peek().kind == "number" else None
            hint = Dim(name).hint
            if lexer.peek().kind == "path":
                place, written = lexer.place(), lexer.next().text[1:]
                if not written.isdigit():
                    raise lexer.error(f"expected the traced size after @, found {written!r}", at=place)
                hint = int(written)
            dims.append(Dim(name, smallest, largest, hint))
            if not lexer.accept(","):
                lexer.expect(")")
                break
        return dims

    def _header(self, dims: list[Dim]) -> None:
        lexer = self.lexer
        while lexer.peek().kind == "word" and lexer.peek().text != "return":
            start, key = lexer.place(), lexer.next().text
            if key == "require":
                condition = lexer.string("a condition in quotes")
                try:
                    names_in(condition)
                except ProgramError as error:
                    raise lexer.error(error.what, at=start) from error
                unknown = sorted(names_in(condition) - {dim.name for dim in dims})
                if unknown:
                    raise lexer.error(f"the condition speaks of {unknown[0]!r}, which is no dimension", at=start)
                self.conditions.append(condition)
            elif key == "alias":
                alias = lexer.string("the further name of a weight")
                lexer.expect("=")
                self.aliases[alias] = lexer.string("the name of a weight")
            elif key == "forward":
                names = [lexer.take("word", "the name of a parameter")]
                while lexer.accept(","):
                    names.append(lexer.take("word", "the name of a parameter"))
                self.spec["parameters"] = tuple(names)
            elif key == "takes":
                self.spec["in"] = read_tree(lexer, self._input_leaf)
            elif key == "gives":
                self.spec["out"] = read_tree(lexer, self._output_leaf)
            else:
                raise lexer.error(
                    f"'{key}' is not something a program's header says",
                    at=start,
                    hint="it says require, alias, forward, takes and gives",
                )

    def _input_leaf(self, lexer: Lexer) -> Leaf:
        if lexer.accept("input"):
            return Leaf(name=lexer.string("the name of an input"))
        return Leaf(constant=self._value())

    @staticmethod
    def _output_leaf(lexer: Lexer) -> Leaf:
        lexer.expect("*")
        return Leaf()

    def _signature(self, at: int) -> Signature:
        inputs = [str(node.target) for node in self.graph.nodes if node.op == "placeholder"]
        results = self.graph.output_node().args[0]
        assert isinstance(results, tuple)
        default = default_signature(inputs, len(results))
        if not self.spec:
            return default
        in_spec, leaves = self.spec.get("in", (default.in_spec, [Leaf(name) for name in inputs]))
        out_spec, _ = self.spec.get("out", (default.out_spec, []))
        fed = [leaf.name for leaf in leaves if leaf.name is not None]
        if fed != inputs:
            raise self.lexer.error(
                f"'takes' feeds the inputs {', '.join(fed)}; the program has {', '.join(inputs)}", at=at
            )
        if out_spec.num_leaves != len(results):
            raise self.lexer.error(f"'gives' has {out_spec.num_leaves} results; {len(results)} are returned", at=at)
        return Signature(
            in_spec=in_spec,
            out_spec=out_spec,
            inputs=tuple(leaf.name for leaf in leaves),
            constants={index: leaf.constant for index, leaf in enumerate(leaves) if leaf.name is None},
            parameters=self.spec.get("parameters", () if "in" in self.spec else default.parameters),
        )

    # -- statements ----------------------------------------------------------------------------------------------------

    def _statement(self) -> None:
        lexer = self.lexer
        start, name = lexer.place(), lexer.next().text[1:]
        if name in self.values:
            raise lexer.error(f"%{name} is defined twice", at=start)
        lexer.expect("=")
        place, word = lexer.place(), lexer.peek()
        if word.kind != "word":
            question = word.text == "?"
            hint = "a question mark stands for what has no written form" if question else "such as aten.linear"
            raise lexer.error(f"expected 'input', 'weight', 'buffer' or an operator, found {word}", hint=hint)
        lexer.next()
        if word.text == "input":
            target = lexer.string("the input's name")
            plain = target.isidentifier() and target.isascii() and not keyword.iskeyword(target)
            if not plain or target in _KEPT or target in self.inputs:
                raise lexer.error(f"the input's name {target!r} is not a Python name, or is used twice", at=place)
            self.inputs.add(target)
            node = self._create(start, "placeholder", target, (), {}, name)
            declared = self._written_type()
            if not isinstance(declared, TensorType):
                raise lexer.error("an input needs a type, such as ': f32[batch, 16]'", at=place)
            if self.types:
                node.meta[VAL] = self._at(place, functools.partial(self.symbols.fake, declared))
            else:
                node.meta[DECLARED] = declared
        elif word.text in ("weight", "buffer"):
            self._weight(start, name, is_parameter=word.text == "weight")
            return
        else:
            target = self._at(place, lambda: resolve_target(word.text))
            args, kwargs = self._operands()
            args, kwargs = canonical_call(target, args, kwargs)
            node = self._create(start, "call_function", target, args, kwargs, name)
            if self.types:
                self._at(start, lambda: self.symbols.infer(node, self.built.tensor))
            if lexer.accept(":"):
                place, written = lexer.place(), read_type(lexer)
                if self.types:
                    self._check_type(node, place, written)
                else:
                    node.meta[DECLARED] = written
        self._provenance(node)

    def _create(
        self, at: int, op: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str
    ) -> fx.Node:
        node = self.graph.create_node(op, target, args, kwargs, name)
        if node.name != name:
            reason = "is a word of Python" if keyword.iskeyword(name) else "is a name torch.fx keeps for itself"
            raise self.lexer.error(f"%{name} {reason}", at=at, hint=f"call it %{node.name}")
        self.values[name] = node
        return node

    def _weight(self, start: int, name: str, *, is_parameter: bool) -> None:
        lexer = self.lexer
        place = lexer.place()
        target = lexer.string("the weight's name")
        node = self._create(start, "get_attr", target, (), {}, name)
        kind = self._written_type()
        strides: tuple[int, ...] | None = None
        if lexer.accept("strides"):
            lexer.expect("(")
            strides = tuple(self._sequence(")"))
        flag = next((word for word in ("frozen", "trained") if lexer.accept(word)), "")
        self._provenance(node)
        if target in self.weights or target in self.aliases:
            raise lexer.error(f"the weight {target!r} has a line already, or is an alias", at=place)
        self.weights.add(target)
        tensor = self._tensor(target, kind, strides, place)
        requires_grad = flag == "trained" or (is_parameter and flag != "frozen")
        if requires_grad and not (tensor.is_floating_point() or tensor.is_complex()):
            raise lexer.error(f"{target!r} has no gradient: it holds {tensor.dtype}", at=place, hint="write 'frozen'")
        self._at(place, lambda: self.built.set_tensor(target, _declared(tensor, is_parameter, requires_grad)))
        if self.types:
            self._at(place, lambda: self.symbols.infer(node, self.built.tensor))
        else:
            node.meta[DECLARED] = TensorType(tensor.dtype, tuple(tensor.shape))

    def _tensor(self, target: str, kind: ValueType | None, strides: tuple[int, ...] | None, place: int) -> torch.Tensor:
        if kind is not None and not isinstance(kind, TensorType):
            raise self.lexer.error(f"a weight cannot be of type {kind}", at=place)
        if kind is not None and not all(isinstance(size, int) for size in kind.shape):
            raise self.lexer.error(f"the sizes of a weight are numbers, not {kind}", at=place)
        if self.tensors is None or (target not in self.tensors and not self.types):
            if kind is None:
                raise self.lexer.error("a weight needs a type when its tensor is not given", at=place)
            shape = [int(size) for size in kind.shape]
            try:
                if strides is None:
                    return torch.empty(shape, dtype=kind.dtype, device="meta")
                return torch.empty_strided(shape, strides, dtype=kind.dtype, device="meta")
            except (RuntimeError, TypeError, OverflowError) as error:
                raise self.lexer.error(f"there is no tensor of type {kind}: {error}", at=place) from error
        if target not in self.tensors:
            raise self.lexer.error(f"no tensor was given for the weight {target!r}", at=place)
        tensor = self.tensors[target]
        found = TensorType(tensor.dtype, tuple(tensor.shape))
        if kind is not None and found != kind:
            where, context = self.lexer.describe(place)
            raise TypeMismatch(f"the weight {target!r} is {found}, the text says {kind}", where=where, context=context)
        return tensor if strides is None or tensor.stride() == strides else restrided(tensor, strides)

    def _return(self) -> None:
        values: list[Any] = []
        while self.lexer.peek().text != "}" and self.lexer.peek().kind not in ("path", "tag", "end"):
            values.append(self._value())
            if not self.lexer.accept(","):
                break
        node = self.graph.output(tuple(values))
        self._provenance(node)

    def _provenance(self, node: fx.Node) -> None:
        lexer = self.lexer
        node.meta[provenance.TAGS] = frozenset[str]()
        while lexer.peek().kind in ("path", "tag", "string"):
            token = lexer.next()
            text = token.text if token.kind == "string" else token.text[1:]
            said = lexer.unquote(text, token.start) if text.startswith('"') else text
            if token.kind == "tag":
                provenance.add_tags(node, [said])
            else:
                node.meta[provenance.PATH if token.kind == "path" else provenance.SOURCE] = said

    # -- values --------------------------------------------------------------------------------------------------------

    def _operands(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        lexer = self.lexer
        lexer.expect("(")
        args, kwargs = list[Any](), dict[str, Any]()
        while not lexer.accept(")"):
            token = lexer.peek()
            if token.kind == "word" and lexer.text[token.start + len(token.text) :].lstrip(" \t").startswith("="):
                lexer.next()
                lexer.expect("=")
                kwargs[token.text] = self._value()
            elif kwargs:
                raise lexer.error("an operand by position follows one by name")
            else:
                args.append(self._value())
            if not lexer.accept(","):
                lexer.expect(")")
                break
        return tuple(args), kwargs

    def _value(self) -> Any:
        lexer = self.lexer
        token = lexer.next()
        if token.kind == "value":
            if token.text[1:] in self.values:
                return self.values[token.text[1:]]
            near = difflib.get_close_matches(token.text[1:], self.values, n=1)
            hint = f"did you mean %{near[0]}?" if near else "a value is defined before it is used"
            raise lexer.error(f"{token.text} is not defined here", at=token.start, hint=hint)
        if token.kind == "number":
            return float(token.text) if any(sign in token.text for sign in ".eEi") else int(token.text)
        if token.kind == "string":
            return lexer.unquote(token.text, token.start)
        if token.text == "[":
            return self._sequence("]")
        if token.text == "(":
            return tuple(self._sequence(")"))
        if token.kind == "word":
            return self._word(token.text, token.start)
        unwritten = "a question mark stands for a value that has no written form" if token.text == "?" else None
        raise lexer.error(f"expected a value, found {token}", at=token.start, hint=unwritten)

    def _word(self, word: str, at: int) -> Any:
        lexer = self.lexer
        if word in _CONSTANTS:
            return _CONSTANTS[word]
        if word in _FLOATS:
            return float(word)
        if word == "device":
            lexer.expect("(")
            name = lexer.string("the name of a device")
            lexer.expect(")")
            try:
                return torch.device(name)
            except RuntimeError as error:
                raise lexer.error(f"{name!r} is not a device", at=at) from error
        if word == "complex":
            lexer.expect("(")
            real, imaginary = self._sequence(")")
            return complex(real, imaginary)
        found = DTYPES_BY_NAME.get(word) or getattr(torch, word.removeprefix("torch."), None)
        if word in DTYPES_BY_NAME or (
            word.startswith("torch.") and isinstance(found, torch.dtype | torch.layout | torch.memory_format)
        ):
            return found
        raise lexer.error(
            f"'{word}' is not a value", at=at, hint='values of the program begin with %, strings stand in "quotes"'
        )

    def _sequence(self, closing: str) -> list[Any]:
        values: list[Any] = []
        while not self.lexer.accept(closing):
            values.append(self._value())
            if not self.lexer.accept(","):
                self.lexer.expect(closing)
                break
        return values

    def _written_type(self) -> ValueType | None:
        return read_type(self.lexer) if self.lexer.accept(":") else None

    def _check_type(self, node: fx.Node, place: int, written: ValueType | None) -> None:
        inferred = self.built.type_of(node)
        if not self.agreement(inferred, written):
            where, context = self.lexer.describe(place)
            raise TypeMismatch(
                f"%{node.name} is {inferred}, the text says {written}",
                where=where,
                context=context,
                hint="correct the type, or leave it out",
            )

    def _at(self, place: int, action: Callable[[], Any]) -> Any:
        """Do something, and say where in the text it failed."""
        try:
            return action()
        except ProgramError as error:
            self._refuse(error, place)

    def _refuse(self, error: ProgramError, place: int) -> NoReturn:
        where, context = self.lexer.describe(place)
        raise type(error)(error.what, where=where, hint=error.hint, context=[*context, *error.context]) from error


def _declared(tensor: torch.Tensor, is_parameter: bool, requires_grad: bool) -> torch.Tensor:
    """The tensor as a parameter or plain tensor, itself if it is one already."""
    if isinstance(tensor, nn.Parameter) == is_parameter and tensor.requires_grad == requires_grad:
        return tensor
    plain = tensor.detach()
    return nn.Parameter(plain, requires_grad) if is_parameter else plain.requires_grad_(requires_grad)


def restrided(tensor: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
    """A tensor of the same values with these strides; dimensions of stride 0 share their elements."""
    single = tuple(
        slice(0, 1) if stride == 0 and size > 1 else slice(None)
        for stride, size in zip(strides, tensor.shape, strict=True)
    )
    compact = tensor.detach()[single]
    made = torch.empty_strided(compact.shape, strides, dtype=tensor.dtype, device=tensor.device)
    return made.copy_(compact).expand(tensor.shape)
