"""The text form: readable, exact, and parsed back to the same program."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tests.ir.models import EVERYTHING, assert_same_bits, encoder_inputs, encoder_program, everything_tensors
from torch import nn
from torch.utils import _pytree as pytree

from graphwright.frontends.torch import trace
from graphwright.ir.equality import first_difference
from graphwright.ir.errors import ProgramError, TypeMismatch
from graphwright.ir.literals import format_value
from graphwright.ir.names import op_name
from graphwright.ir.parser import parse
from graphwright.ir.program import Program
from graphwright.ir.provenance import path_of, source_of, tags_of
from graphwright.ir.text import lines_around, print_node, print_program
from graphwright.ir.verifier import verify

SMALL = """\
program Small(batch: 1..) {
  %x = input "x" : f32[batch, 4]
  %relu = aten.relu(%x) : f32[batch, 4]
  return %relu
}
"""


def one_line(line: str, inputs: str = '%x = input "x" : f32[batch, 4]', result: str = "%y") -> Program:
    """A program of one call."""
    return parse(f"program P(batch: 1..) {{\n {inputs}\n {line}\n return {result}\n}}")


def test_everything_the_text_can_say_comes_back_character_by_character() -> None:
    assert print_program(parse(EVERYTHING)) == EVERYTHING
    program = parse(EVERYTHING, everything_tensors())
    assert print_program(program) == EVERYTHING
    verify(program)


def test_what_the_text_says_is_what_the_program_holds() -> None:
    tensors = everything_tensors()
    program = parse(EVERYTHING, tensors)
    assert program.title == "Everything"
    assert [(dim.name, dim.min, dim.max, dim.hint) for dim in program.dims.values()] == [
        ("batch", 1, None, 3),
        ("sequence", 2, 64, 5),
    ]
    assert program.symbols.conditions == ("batch != sequence",)
    assert program.aliases == {"head.weight": "embed.weight"}
    assert program.signature.parameters == ("ids", "scale", "flag")
    assert program.signature.inputs == ("ids", "scale", None)
    assert program.signature.constants == {2: True}
    parameters = dict(program.named_parameters())
    assert set(parameters) == {"embed.weight", "frozen"}
    assert parameters["embed.weight"].requires_grad
    assert not parameters["frozen"].requires_grad
    assert parameters["frozen"].stride() == (1, 4)
    assert parameters["embed.weight"].data_ptr() == tensors["embed.weight"].data_ptr(), "weights are shared, not copied"
    assert program.tensor("state").requires_grad
    line, scaled = program.node("line"), program.node("scaled")
    assert (path_of(line), source_of(line), tags_of(line)) == ("inner.linear", "net.py:12", frozenset({"quantized"}))
    assert (path_of(scaled), tags_of(scaled)) == ("odd path #1", frozenset({"a/b", "two words"}))
    assert program.node("shifted").kwargs == {"alpha": -0.5}
    assert program.node("clamped").args[1:] == (float("-inf"), 1e30)
    assert program.node("picked").args[1] == [None, program.node("positions")]


def test_the_parsed_program_computes_what_the_text_says() -> None:
    tensors = everything_tensors()
    program = parse(EVERYTHING, tensors)
    ids, scale = torch.tensor([[1, 2, 10], [0, 3, 4], [7, 8, 9], [1, 1, 1]]), torch.tensor([1.0, 2.0, -1.0, 0.5])
    found = program(ids, scale=scale.view(4, 1, 1), flag=True)
    line = (tensors["embed.weight"][ids] * scale.view(4, 1, 1) - 0.5 * tensors["state"]).clamp(max=1e30)
    line = line @ tensors["frozen"].t()
    kept = torch.where(tensors["mask"], line, torch.nan)
    assert_same_bits(found["logits"], nn.functional.linear(kept[:, :2], tensors["embed.weight"]))
    left, (right,) = found["parts"]
    assert_same_bits([left, right], list(torch.cat([kept.double()] * 2).split([1, 3], 2)))


def test_a_traced_program_comes_back_with_everything() -> None:
    model, program = encoder_program()
    text = print_program(program)
    again = parse(text, program.tensors())
    assert first_difference(program, again, names=True, provenance=True, values=True) is None
    assert print_program(again) == text
    assert_same_bits(again(**encoder_inputs()), model(**encoder_inputs()))
    assert again.tensor("head.weight") is program.tensor("embed.weight")


def test_without_tensors_weights_have_types_only() -> None:
    _, program = encoder_program()
    again = parse(print_program(program))
    assert all(tensor.is_meta for tensor in again.tensors().values())
    assert first_difference(program, again, names=True, provenance=True) is None
    verify(again)


def test_types_and_provenance_can_be_left_out() -> None:
    program = parse(EVERYTHING, everything_tensors())
    bare = print_program(program, types=False, provenance=False)
    assert "net.py" not in bare
    assert "#" not in bare
    assert "%line = aten.linear(%clamped, %f)\n" in bare
    assert "%ids = input" in bare


def test_a_hand_written_text_needs_no_types_of_calls_and_no_signature() -> None:
    program = parse(
        """
        // two inputs, by position
        program P(n: 1..) {
          %x = input "x" : f32[n, 4]  // a comment
          %y = input "y" : f32[n, 4]
          %total = aten.add.Tensor(%x, %y, alpha=1)
          %twice = aten.mul.Tensor(
              %total, 2,
          )
          return %twice, %total
        }
        """
    )
    twice, total = program(torch.ones(3, 4), torch.ones(3, 4))
    assert twice.tolist() == [[4.0] * 4] * 3
    assert total.tolist() == [[2.0] * 4] * 3
    assert str(program.type_of(program.node("twice"))) == "f32[n, 4]"
    assert program.node("total").kwargs == {}, "operands are brought into the canonical spelling"


def test_one_result_is_returned_bare_and_none_as_an_empty_tuple() -> None:
    assert parse(SMALL)(torch.tensor([[-1.0, 2, -3, 4]])).tolist() == [[0, 2, 0, 4]]
    empty = parse('program P() {\n %x = input "x" : f32[2]\n return\n}')
    assert empty(torch.ones(2)) == ()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "None"),
        (True, "True"),
        (-3, "-3"),
        (2**62, str(2**62)),
        (1.0, "1.0"),
        (-0.0, "-0.0"),
        (1e-12, "1e-12"),
        (1e22, "1e+22"),
        (0.1 + 0.2, "0.30000000000000004"),
        (float("inf"), "inf"),
        (float("-inf"), "-inf"),
        (float("nan"), "nan"),
        (complex(0.5, -2), "complex(0.5, -2.0)"),
        ('a "b"\n\\ä%#//', '"a \\"b\\"\\n\\\\\\u00e4%#//"'),
        (torch.float32, "f32"),
        (torch.bool, "bool"),
        (torch.float8_e4m3fn, "torch.float8_e4m3fn"),
        (torch.strided, "torch.strided"),
        (torch.channels_last, "torch.channels_last"),
        (torch.device("cuda:1"), 'device("cuda:1")'),
        ([], "[]"),
        ([1, [2.5, None]], "[1, [2.5, None]]"),
        ((1,), "(1,)"),
        ((), "()"),
    ],
)
def test_every_kind_of_constant_comes_back_exactly(value: Any, text: str) -> None:
    assert format_value(value) == text
    program = parse(
        f'program P() {{\n takes ((input "x", {text}), {{}})\n gives *\n %x = input "x" : f32[2]\n return %x\n}}'
    )
    found = program.signature.constants.get(1)
    if isinstance(value, list | tuple):  # in a signature, a container is a container
        program = parse(f'program P() {{\n %x = input "x" : f32[2]\n return %x, {text}\n}}')
        found = program.output.args[0][1]
    assert type(found) is type(value) or isinstance(value, list)
    assert repr(found) == repr(value)


def test_integers_that_depend_on_values_are_numbered_from_zero() -> None:
    text = """\
program P(batch: 1..) {
  %x = input "x" : f32[batch, 4]
  %nonzero = aten.nonzero(%x) : i64[u0, 2]
  %relu = aten.relu(%x) : f32[batch, 4]
  %other = aten.nonzero(%relu) : i64[u1, 2]
  return %nonzero, %other
}
"""
    program = parse(text)
    for _ in range(3):
        program.infer_types()
    assert print_program(program) == text


def test_an_unsigned_type_is_not_taken_for_such_a_size() -> None:
    text = 'program P() {\n  %x = input "x" : u8[3]\n  %y = aten.to.dtype(%x, i16) : i16[3]\n  return %y\n}\n'
    assert print_program(parse(text)) == text


def test_lines_around_a_node_mark_it() -> None:
    program = parse(EVERYTHING)
    lines = lines_around(program, program.node("line"), radius=1)
    assert [line[0] for line in lines] == [" ", ">", " "]
    assert lines[1].startswith("> %line = aten.linear(%clamped, %f) : f32[batch, sequence, 4]")
    assert "net.py" not in "".join(lines)
    assert print_node(program, program.node("kept")) == (
        "%kept = aten.where.ScalarOther(%b, %line, nan) : f32[batch, sequence, 4]"
    )


def test_a_malformed_program_still_prints() -> None:
    program = parse(SMALL)
    node = program.node("relu")
    node.args = (torch.Generator(), slice(1, 2))  # type: ignore[assignment]
    node.target = len
    node.meta.clear()
    program.graph.output_node().args = ()
    text = print_program(program)
    assert "%relu = ?<built-in function len>(?" in text
    with pytest.raises(ProgramError, match=r"found '\?'"):
        parse(text)


# -- signatures --------------------------------------------------------------------------------------------------------


@dataclass
class Pair:
    """A result type that torch.export is told of."""

    first: Any
    second: Any


Point = namedtuple("Point", "x y")


class Nested(nn.Module):
    """Arguments and results of many kinds."""

    def forward(self, x: torch.Tensor, parts: Any, flag: bool = False, rest: Any = None) -> Any:
        return (
            OrderedDict(a=x + parts["b"][0], b=[x]),
            {1: Pair(x * 2, rest[0]), "k": Point(x, x + 1)},
            None,
            3 if flag else 4,
        )


def test_nested_arguments_and_results_come_back() -> None:
    torch.export.register_dataclass(Pair, serialized_type_name=f"{Pair.__module__}.Pair")
    x = torch.arange(6.0).view(2, 3)
    kwargs = {"parts": {"b": [x + 1, x]}, "flag": True, "rest": (x - 1,)}
    program = trace(Nested(), (x,), example_kwargs=kwargs)
    again = parse(print_program(program), program.tensors())
    assert again.signature == program.signature
    found, expected = again(x, **kwargs), Nested()(x, **kwargs)
    assert pytree.tree_structure(found) == pytree.tree_structure(expected)
    assert type(found[1][1]) is Pair
    assert type(found[1]["k"]) is Point
    assert found[3] == 3
    assert_same_bits(
        [item for item in pytree.tree_leaves(found) if isinstance(item, torch.Tensor)],
        [item for item in pytree.tree_leaves(expected) if isinstance(item, torch.Tensor)],
    )


def test_a_type_unknown_here_is_imported_or_named() -> None:
    text = SMALL.replace("{\n", '{\n  takes ((input "x",), {})\n  gives type "KIND" ["a"] (*)\n', 1)
    with pytest.raises(ProgramError, match=r"no module 'nowhere' here") as caught:
        parse(text.replace("KIND", "nowhere.at.All"))
    assert caught.value.where == "line 3, column 9"
    with pytest.raises(ProgramError, match=r"the module collections has no type 'Nothing' any more"):
        parse(text.replace("KIND", "collections.Nothing"))
    with pytest.raises(ProgramError, match=r"has no written form"):
        parse(text.replace("KIND", "collections.Counter"))
    with pytest.raises(ProgramError, match=r"is not the full name of a type"):
        parse(text.replace("KIND", "Counter"))


# -- errors ------------------------------------------------------------------------------------------------------------

HEAD = 'program P(batch: 1..) {\n  %x = input "x" : f32[batch, 4]\n'


@pytest.mark.parametrize(
    ("text", "where", "says"),
    [
        ("", "line 1, column 1", "expected 'program', found the end of the text"),
        ("program", "line 1, column 8", "expected the program's name"),
        ("program P(batch) {", "line 1, column 16", "expected ':'"),
        ("program P(batch: ..5) {", "line 1, column 18", "expected the smallest size"),
        ("program P(a: 1.., a: 1..) {", "line 1, column 19", "declared twice"),
        ("program P(a: 1..@b) {", "line 1, column 17", "expected the traced size after @"),
        ("program P() {\n  forget me\n}", "line 2, column 3", "'forget' is not something a program's header says"),
        ('program P() {\n  require "1 +"\n}', "line 2, column 3", "is not a condition on dimensions"),
        ('program P() {\n  require "n > 1"\n}', "line 2, column 3", "speaks of 'n', which is no dimension"),
        (HEAD + "}", "line 3, column 1", "or 'return'"),
        (HEAD + "  return %x", "line 3, column 12", "expected '}', found the end of the text"),
        (HEAD + "  return %x\n} more", "line 4, column 3", "expected the end of the text, found 'more'"),
        (HEAD + "  %x = aten.relu(%x)", "line 3, column 3", "%x is defined twice"),
        (HEAD + "  %class = aten.relu(%x)", "line 3, column 3", "%class is a word of Python"),
        (HEAD + "  %torch = aten.relu(%x)", "line 3, column 3", "%torch is a name torch.fx keeps for itself"),
        (HEAD + "  %y = aten.relu(%z)", "line 3, column 18", "%z is not defined here"),
        (HEAD + "  %y = aten.rely(%x)", "line 3, column 8", "no operator is named 'aten.rely'"),
        (HEAD + "  %y = aten.relu.out2(%x)", "line 3, column 8", "no operator is named 'aten.relu.out2'"),
        (HEAD + "  %y = graphwright.nothing(%x)", "line 3, column 8", "the dialect has no operator 'nothing'"),
        (HEAD + "  %y = py.eval(%x)", "line 3, column 8", "no operator is named 'py.eval'"),
        (HEAD + "  %y = os.system(%x)", "line 3, column 8", "no operator is named 'os.system'"),
        (HEAD + "  %y = aten.relu(%x", "line 3, column 20", "expected ')', found the end of the text"),
        (HEAD + "  %y = aten.relu(self=%x, %x)", "line 3, column 27", "an operand by position follows one by name"),
        (HEAD + "  %y = aten.relu(x)", "line 3, column 18", "'x' is not a value"),
        (HEAD + "  %y = aten.relu(?)", "line 3, column 18", "expected a value, found '?'"),
        (HEAD + '  %y = aten.relu("x)', "line 3, column 18", "cannot stand here"),
        (HEAD + '  %y = aten.relu("\\q")', "line 3, column 18", "the string is not valid"),
        (HEAD + "  %y = aten.relu(%x) : f32[batch, 5]", "line 3, column 24", "%y is f32[batch, 4], the text says"),
        (HEAD + "  %y = aten.relu(%x) : f31[batch, 4]", "line 3, column 24", "'f31' is not a type"),
        (HEAD + "  %y = aten.relu(%x) : f32[batch,", "line 3, column 34", "expected a size"),
        (HEAD + "  %y = aten.mm(%x, %x)", "line 3, column 3", "does not accept these operands"),
        (HEAD + '  %y = input "y"', "line 3, column 8", "an input needs a type"),
        (HEAD + '  %y = input "x" : f32[2]', "line 3, column 8", "is used twice"),
        (HEAD + '  %y = input "a b" : f32[2]', "line 3, column 8", "is not a Python name"),
        (HEAD + '  %y = input "y" : f32[width]', "line 3, column 8", "unknown dimension 'width'"),
        (HEAD + '  %w = weight "w"\n', "line 3, column 15", "a weight needs a type when its tensor is not given"),
        (HEAD + '  %w = weight "w" : f32[batch]', "line 3, column 15", "the sizes of a weight are numbers"),
        (HEAD + '  %w = weight "w" : int(3)', "line 3, column 15", "a weight cannot be of type int(3)"),
        (HEAD + '  %w = weight "w" : i64[3]', "line 3, column 15", "'w' has no gradient: it holds torch.int64"),
        (HEAD + '  %w = weight "" : f32[3]', "line 3, column 15", "is not a weight's name"),
        (HEAD + '  %w = weight "a..b" : f32[3]', "line 3, column 15", "is not a weight's name"),
        (HEAD + '  %w = weight "w" : f32[99999999999999999999]', "line 3, column 15", "there is no tensor of type"),
        (HEAD + '  %w = weight "w" : f32[2]\n  %v = weight "w" : f32[2]', "line 4, column 15", "has a line already"),
        (HEAD + '  %w = weight "graph" : f32[2]', "line 3, column 15", "the name 'graph' is taken"),
        (HEAD + '  %w = weight "w.a" : f32[2]\n  %v = weight "w" : f32[2]', "line 4, column 15", "is taken"),
        (
            HEAD + '  %w = weight "w" : f32[2]\n  %v = weight "w.a" : f32[2]',
            "line 4, column 15",
            "lies inside a weight",
        ),
    ],
)
def test_errors_name_the_place_show_the_line_and_say_what_is_wrong(text: str, where: str, says: str) -> None:
    with pytest.raises(ProgramError) as caught:
        parse(text)
    assert says in caught.value.what
    assert caught.value.where == where
    number, column = (int(word) for word in where.replace("line ", "").replace(" column ", "").split(","))
    lines = text.split("\n")
    assert caught.value.context[0] == (lines[number - 1] if number <= len(lines) else "")
    assert caught.value.context[1].index("^") == column - 1


@pytest.mark.parametrize(
    "line",
    [
        '%y = load_library.__call__.__call__("/nowhere.so")',
        '%y = __class__.load_library.__call__("/nowhere.so")',
        '%w = weight "a\\"); __import__(\\"os\\").abort() #" : f32[2]',
        '%w = weight "a\\u0000" : f32[2]',
        '%y = input "torch" : f32[2]',
        '%y = input "a=print(1)" : f32[2]',
    ],
)
def test_a_text_reaches_nothing_but_operators(line: str) -> None:
    with pytest.raises(ProgramError, match="no operator is named|is not a weight's name|is not a Python name"):
        parse(HEAD + f"  {line}\n  return %x\n}}")


def test_hints_say_what_to_do() -> None:
    with pytest.raises(ProgramError, match=r"did you mean %hidden\?"):
        parse(HEAD + "  %hidden = aten.relu(%x)\n  %y = aten.relu(%hiden)")
    with pytest.raises(ProgramError, match=r"call it %max_1"):
        parse(HEAD + "  %max = aten.relu(%x)")
    with pytest.raises(TypeMismatch, match="correct the type, or leave it out"):
        parse(HEAD + "  %y = aten.relu(%x) : i64[batch, 4]")


def test_a_long_line_is_cut_around_the_place() -> None:
    with pytest.raises(ProgramError) as caught:
        parse(HEAD + f"  %y = aten.cat([{'%x, ' * 500}%nothing])")
    line, caret = caught.value.context
    assert len(line) < 200
    assert line[caret.index("^") :].startswith("%nothing")


def test_tensors_must_fit_the_text() -> None:
    text = HEAD + '  %w = weight "a.w" : f32[3, 4]\n  %y = aten.linear(%x, %w)\n  return %y\n}'
    with pytest.raises(ProgramError, match="no tensor was given for the weight 'a.w'"):
        parse(text, {})
    with pytest.raises(TypeMismatch, match=r"the weight 'a.w' is f32\[3, 5\], the text says f32\[3, 4\]"):
        parse(text, {"a.w": torch.zeros(3, 5)})
    with pytest.raises(TypeMismatch, match=r"the weight 'a.w' is f64\[3, 4\]"):
        parse(text, {"a.w": torch.zeros(3, 4, dtype=torch.float64)})


def test_signature_and_graph_must_fit() -> None:
    takes = '  takes ((input "y",), {})\n'
    with pytest.raises(ProgramError, match="'takes' feeds the inputs y; the program has x"):
        parse(SMALL.replace("{\n", "{\n" + takes, 1))
    with pytest.raises(ProgramError, match="'gives' has 2 results; 1 are returned"):
        parse(SMALL.replace("{\n", "{\n  gives (*, *)\n", 1))
    with pytest.raises(ProgramError, match="the alias 'a' stands for 'b'"):
        parse(SMALL.replace("{\n", '{\n  alias "a" = "b"\n', 1))


def test_deep_nesting_is_refused_and_not_a_crash() -> None:
    with pytest.raises(ProgramError, match="nested too deeply"):
        parse(HEAD + f"  %y = aten.cat({'[' * 100_000}")


def test_sizes_spelled_in_another_way_agree() -> None:
    program = one_line("%y = aten.cat([%x, %x]) : f32[batch + batch, 4]")
    assert str(program.type_of(program.node("y"))) == "f32[2*batch, 4]"
    with pytest.raises(TypeMismatch):
        one_line("%y = aten.cat([%x, %x]) : f32[batch*batch, 4]")
    with pytest.raises(TypeMismatch):
        one_line("%y = aten.cat([%x, %x]) : f32[2*bitch, 4]")
    halves = one_line("%y = aten.slice.Tensor(%x, 0, 0, 9223372036854775807, 2)")
    assert print_program(parse(print_program(halves))) == print_program(halves)


def test_third_party_operators_keep_their_names() -> None:
    program = one_line("%y = prims.convert_element_type(%x, f64) : f64[batch, 4]")
    assert op_name(program.node("y")) == "prims.convert_element_type"


# -- real models -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["minilm", "tinylm"])
def test_real_models_come_back_exactly(name: str, request: pytest.FixtureRequest) -> None:
    program: Program = request.getfixturevalue(f"{name}_program")
    text = print_program(program)
    again = parse(text, program.tensors())
    assert print_program(again) == text
    assert first_difference(program, again, names=True, provenance=True, values=True) is None
    assert type(again(**request.getfixturevalue("token_batch"))) is type(
        program(**request.getfixturevalue("token_batch"))
    )
